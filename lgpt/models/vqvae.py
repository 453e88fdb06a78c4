"""The VQ-VAE in the architecture and key grammar of taming-transformers' VQGAN.

One class for every source: trained here, a taming `.ckpt`, or the Flax port of it. Keys, paddings
and the place of attention follow `taming/modules/diffusionmodules/model.py` (CompVis 3ba01b24).
Shapes: B batch, C channels, H W pixels, h w latent grid = H/f W/f.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lgpt.core.errors import CheckpointError
from lgpt.core.files import write_json_atomically
from lgpt.models.quantizer import VectorQuantizer
from lgpt.settings.vqvae import VqvaeSettings

_TRAINING_ONLY = ("codebook_update", "ema_decay", "revive_dead_codes", "dropout")


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """The architecture; names as in `VqvaeSettings`.

    Attributes:
        input_range: Range of the pictures the weights expect; callers always use [-1, 1].
    """

    codebook_size: int
    code_dim: int
    z_channels: int = 256
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    resolution: int = 256
    dropout: float = 0.0
    l2_normalized_codes: bool = False
    codebook_update: str = "gradient"
    ema_decay: float = 0.99
    revive_dead_codes: bool = True
    input_range: str = "-1..1"

    @classmethod
    def from_settings(cls, settings: VqvaeSettings) -> VQVAEConfig:
        """The architecture that a run config describes."""
        return cls(**settings.model_dump())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VQVAEConfig:
        """Back from `to_dict`; CheckpointError for unknown or missing fields."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise CheckpointError(
                f"VQ-VAE config has unknown fields {unknown}; known are {sorted(known)}."
            )
        if missing := sorted({"codebook_size", "code_dim"} - set(values)):
            raise CheckpointError(f"VQ-VAE config lacks {missing}.")
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**tuples)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def downsample_factor(self) -> int:
        """Pixels a side of one token: f = 2^(levels - 1)."""
        return int(2 ** (len(self.ch_mult) - 1))


class VQVAEOutput(NamedTuple):
    """One training forward.

    Attributes:
        reconstruction: Not clipped; pictures lie in [-1, 1].
        tokens: Row-major code indices.
        codebook_loss: See `Quantized`.
        commitment_loss: See `Quantized`; without its weight.
    """

    reconstruction: Float[Tensor, "batch 3 H W"]
    tokens: Int[Tensor, "batch h w"]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]


class VQVAE(nn.Module):
    """Pictures to tokens and back.

    Args:
        config: The architecture.

    Attributes:
        report: How foreign weights were matched, one line a fact; empty for our own.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.report: tuple[str, ...] = ()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(
            config.codebook_size,
            config.code_dim,
            is_normalized=config.l2_normalized_codes,
            update=config.codebook_update,
            ema_decay=config.ema_decay,
            revive_dead_codes=config.revive_dead_codes,
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return self.config.codebook_size

    @property
    def downsample_factor(self) -> int:
        """Pixels a side of one token."""
        return self.config.downsample_factor

    def forward(self, images: Float[Tensor, "batch 3 H W"]) -> VQVAEOutput:
        """Reconstruct pictures through the codebook; gradients pass straight through.

        Args:
            images: In [-1, 1], H and W multiples of `downsample_factor`.
        """
        quantized = self.quantize(self.latents(images))
        reconstruction = self._to_caller_range(
            self.decoder(self.post_quant_conv(quantized.latents))
        )
        return VQVAEOutput(
            reconstruction, quantized.tokens, quantized.codebook_loss, quantized.commitment_loss
        )

    def latents(self, images: Float[Tensor, "batch 3 H W"]) -> Float[Tensor, "batch dim h w"]:
        """Encoder output before quantization."""
        height, width = images.shape[-2:]
        factor = self.downsample_factor
        if height % factor or width % factor:
            raise ValueError(
                f"picture sides must be multiples of {factor} for this VQ-VAE, got "
                f"{height} x {width}; crop to {height // factor * factor} x "
                f"{width // factor * factor}."
            )
        images = images.to(self.encoder.conv_in.weight.dtype)
        if self.config.input_range == "0..1":
            images = (images + 1) / 2
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch 3 H W"]) -> Int[Tensor, "batch h w"]:
        """Tokens of pictures in [-1, 1]; never moves the codebook.

        Keep the weights in float32 for this: bf16 changes tokens (3 of 32 in the reference set).
        """
        return self.quantize.tokens_of(self.latents(images))

    def decode(self, tokens: Int[Tensor, "batch h w"]) -> Float[Tensor, "batch 3 H W"]:
        """Pictures of tokens, not clipped: values slightly outside [-1, 1] occur."""
        codes = self.quantize.lookup(tokens).to(self.post_quant_conv.weight.dtype)
        return self._to_caller_range(self.decoder(self.post_quant_conv(codes)))

    def _to_caller_range(self, images: Tensor) -> Tensor:
        return images * 2 - 1 if self.config.input_range == "0..1" else images

    def weights_digest(self) -> str:
        """Hex sha256 of everything that decides tokens and pictures: weights and architecture."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in _TRAINING_ONLY}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(inference_state(self).items()):
            array = tensor.detach().cpu().float().contiguous().numpy()
            digest.update(f"{name}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; moving averages are kept."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        state = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()
        }
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        write_json_atomically(
            target / "config.json", {"model_type": "lgpt_vqvae", **self.config.to_dict()}
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VQVAE:
        """Read a folder written by `save_pretrained`, in eval mode on the CPU.

        Raises:
            CheckpointError: The folder is no VQ-VAE, or keys or shapes differ from its config.
        """
        source = Path(folder)
        config_path, weights_path = source / "config.json", source / "model.safetensors"
        for path in (config_path, weights_path):
            if not path.is_file():
                raise CheckpointError(
                    f"{source} is not a VQ-VAE folder: {path.name} is missing. Give the folder "
                    "that `save_pretrained` or `lgpt export` wrote."
                )
        values = json.loads(config_path.read_text())
        if values.pop("model_type", None) != "lgpt_vqvae":
            raise CheckpointError(f"{config_path} does not describe an lgpt VQ-VAE (model_type).")
        model = cls(VQVAEConfig.from_dict(values))
        load_strictly(model, load_file(weights_path), str(weights_path))
        return model.eval()


def inference_state(vqvae: VQVAE) -> dict[str, Tensor]:
    """The state dict without the quantizer's moving averages: exactly taming's keys."""
    training_only = ("quantize.ema_count", "quantize.ema_sum", "quantize.is_initialized")
    return {k: v for k, v in vqvae.state_dict().items() if k not in training_only}


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """`load_state_dict` that names every missing, unexpected and misshapen key at once.

    Raises:
        CheckpointError: Anything does not fit; the model is left unchanged.
    """
    expected = model.state_dict()
    problems = [f"missing {key}" for key in sorted(expected.keys() - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - expected.keys())]
    problems += [
        f"{key} is {list(state[key].shape)}, the config asks for {list(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (
            f"; and {len(problems) - 8} more" if problems[8:] else ""
        )
        raise CheckpointError(f"{source} does not fit its config: {shown}.")
    model.load_state_dict(state, strict=True)


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
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
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
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.transpose(2, 3).reshape(batch, channels, height, width))


class Downsample(nn.Module):
    """Half the size: a zero column right and row below, then a 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where the level has it."""

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
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
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
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden))))


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
        return self.conv_out(F.silu(self.norm_out(hidden)))
