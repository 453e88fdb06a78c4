"""Encoder and decoder of taming-transformers' VQGAN, with its key grammar.

Keys, paddings and the place of attention follow `taming/modules/diffusionmodules/model.py`
(CompVis 3ba01b24). Shapes: B batch, C channels, H W pixels, h w latent grid = H/f W/f.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from lgpt.models.vqvae_config import VQVAEConfig


def _group_norm(channels: int) -> nn.GroupNorm:
    # torch's default eps 1e-5 moves the reference latents by 1.3.
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(drop(swish(norm(conv(swish(norm x)))))), with a 1x1 shortcut if channels change."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _group_norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(functional.silu(self.norm2(hidden))))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + hidden


class AttnBlock(nn.Module):
    """Single-head self-attention over all latent positions, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        normed = self.norm(x)
        q, k, v = (
            conv(normed).view(batch, 1, channels, height * width).transpose(2, 3)
            for conv in (self.q, self.k, self.v)
        )
        attended = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.transpose(2, 3).reshape(batch, channels, height, width))


class Downsample(nn.Module):
    """Half the size: a zero column right and row below, then a 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def _call(part: nn.Module, x: Tensor) -> Tensor:
    return part(x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution.

    Attributes:
        call_part: How a part is run; engine/blocks.py sets another way.
    """

    call_part: ClassVar[Callable[[nn.Module, Tensor], Tensor]] = staticmethod(_call)

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.block_1, self.attn_1, self.block_2):
            x = self.call_part(part, x)
        return x


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where the level has it.

    Attributes:
        call_part: As in `Middle`.
    """

    call_part: ClassVar[Callable[[nn.Module, Tensor], Tensor]] = staticmethod(_call)

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        num_blocks: int,
        has_attention: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.block = nn.ModuleList(
            ResnetBlock(widths[i], channels_out, dropout) for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(
            AttnBlock(channels_out) for _ in range(num_blocks if has_attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = self.call_part(block, x)
            if len(self.attn):
                x = self.call_part(self.attn[index], x)
        if hasattr(self, "downsample"):
            x = self.call_part(self.downsample, x)
        if hasattr(self, "upsample"):
            x = self.call_part(self.upsample, x)
        return x


def _has_attention(config: VQVAEConfig, level: int) -> bool:
    # By the nominal resolution of the config, whatever the size of the pictures.
    return config.resolution // 2**level in config.attn_resolutions


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] to latents [B, z_channels, H/f, W/f]."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.ch
        for level, multiplier in enumerate(config.ch_mult):
            width = config.ch * multiplier
            stage = Level(
                channels,
                width,
                config.num_res_blocks,
                _has_attention(config, level),
                config.dropout,
            )
            if level < len(config.ch_mult) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
            channels = width
        self.mid = Middle(channels, config.dropout)
        self.norm_out = _group_norm(channels)
        self.conv_out = nn.Conv2d(channels, config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv_in(images)
        for stage in self.down:
            hidden = stage(hidden)
        return self.conv_out(functional.silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    """Latents to pictures; `up[i]` is resolution level i, run from the lowest resolution to 0."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        channels = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, config.dropout)
        stages = []
        for level in reversed(range(len(config.ch_mult))):
            width = config.ch * config.ch_mult[level]
            num_blocks = config.num_res_blocks + 1
            stage = Level(
                channels, width, num_blocks, _has_attention(config, level), config.dropout
            )
            if level > 0:
                stage.upsample = Upsample(width)
            stages.insert(0, stage)
            channels = width
        self.up = nn.ModuleList(stages)
        self.norm_out = _group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(latents))
        for stage in reversed(self.up):
            hidden = stage(hidden)
        return self.conv_out(functional.silu(self.norm_out(hidden)))
