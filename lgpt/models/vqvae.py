"""The VQ-VAE in the architecture and key grammar of taming-transformers' VQGAN.

One class for every source: trained here, a taming `.ckpt`, or the Flax port of it. The
networks are in `vqvae_blocks.py`.
Shapes: B batch, C channels, H W pixels, h w latent grid = H/f W/f.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Optional, Union

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lgpt.models.codebook import keep_float32
from lgpt.models.frozen_weights import freeze_in_float32
from lgpt.models.loading_report import LoadingReport
from lgpt.models.model_folder import (
    read_model_config,
    read_weights,
    write_model_config,
    write_model_folder,
)
from lgpt.models.quantizer import VectorQuantizer
from lgpt.models.strict_loading import check_strictly, load_strictly
from lgpt.models.vqvae_blocks import AttnBlock, Decoder, Encoder, ResnetBlock
from lgpt.models.vqvae_config import VQVAEConfig

_MODEL_TYPE = "lgpt_vqvae"
# Fields of the config that decide how it learns, and tensors that only learning needs.
TRAINING_ONLY = ("codebook_update", "ema_decay", "revive_dead_codes", "dropout")
MOVING_AVERAGES = ("quantize.ema_count", "quantize.ema_sum", "quantize.is_initialized")


class VQVAEOutput(NamedTuple):
    """One training forward.

    Attributes:
        reconstruction: Not clipped; pictures lie in [-1, 1].
        tokens: Row-major code indices.
        codebook_loss: See `Quantized`.
        commitment_loss: See `Quantized`; without its weight.
        entropy_loss: See `Quantized`; without its weight.
    """

    reconstruction: Float[Tensor, "batch 3 H W"]
    tokens: Int[Tensor, "batch h w"]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]
    entropy_loss: Float[Tensor, ""]


class VQVAE(nn.Module):
    """Pictures to tokens and back.

    Args:
        config: The architecture.
        entropy_temperature: Training forwards also give the entropy loss at this temperature.

    Attributes:
        loading: What `load_vqvae` found and did; None for one that was not loaded by it.
    """

    zero3_leaf_modules: ClassVar[tuple[type[nn.Module], ...]] = (ResnetBlock, AttnBlock)

    def __init__(self, config: VQVAEConfig, *, entropy_temperature: Optional[float] = None) -> None:
        super().__init__()
        self.config = config
        self.tokens_are_frozen = False
        self.loading: Optional[LoadingReport] = None
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(
            config.codebook_size,
            config.code_dim,
            is_normalized=config.l2_normalized_codes,
            update=config.codebook_update,
            ema_decay=config.ema_decay,
            revive_dead_codes=config.revive_dead_codes,
            entropy_temperature=entropy_temperature,
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    @property
    def report(self) -> tuple[str, ...]:
        """How the weights were matched, one line a fact; empty when nothing was loaded."""
        return () if self.loading is None else self.loading.lines()

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
        if self.tokens_are_frozen:
            return self._forward_of_frozen_tokens(images)
        quantized = self.quantize(self.latents(images))
        reconstruction = self._to_caller_range(
            self.decoder(self.post_quant_conv(quantized.latents))
        )
        return VQVAEOutput(
            reconstruction,
            quantized.tokens,
            quantized.codebook_loss,
            quantized.commitment_loss,
            quantized.entropy_loss,
        )

    def freeze_tokens(self) -> None:
        """From now on only the decoder learns: encoder and codebook are constants in float32.

        Forwards then take the tokens that `encode` gives, also under bf16; latent losses are 0.
        Names in the state dict stay what they were.
        """
        self.tokens_are_frozen = True
        for part in self._frozen_parts():
            freeze_in_float32(part)

    def _frozen_parts(self) -> tuple[nn.Module, ...]:
        all_parts = (self.encoder, self.quant_conv, self.quantize)
        return all_parts if self.tokens_are_frozen else ()

    def _forward_of_frozen_tokens(self, images: Tensor) -> VQVAEOutput:
        tokens = self.encode(_whole_pixels(images))
        zero = torch.zeros((), device=images.device)
        return VQVAEOutput(self.decode(tokens), tokens, zero, zero, zero)

    def train(self, mode: bool = True) -> VQVAE:
        """As every module's, but frozen parts stay in eval mode: dropout would change tokens."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        frozen = [module for part in self._frozen_parts() for module in part.modules()]
        buffers = [dict(module._buffers) for module in frozen]
        super()._apply(fn, recurse)
        for module, before in zip(frozen, buffers):
            keep_float32(module, before)
        return self

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

        Keep the weights in float32 for this: bf16 changes tokens. In the reference set it is 1 to 3
        of 32, by the order of rounding: 3 with taming's unfused swish and attention, 1 with ours.
        """
        with _whole_float32():
            return self.quantize.tokens_of(self.latents(images))

    def decode(self, tokens: Int[Tensor, "batch h w"]) -> Float[Tensor, "batch 3 H W"]:
        """Pictures of tokens, not clipped: values slightly outside [-1, 1] occur."""
        codes = self.quantize.lookup(tokens).to(self.post_quant_conv.weight.dtype)
        return self._to_caller_range(self.decoder(self.post_quant_conv(codes)))

    def _to_caller_range(self, images: Tensor) -> Tensor:
        return images * 2 - 1 if self.config.input_range == "0..1" else images

    def weights_digest(self) -> str:
        """Hex sha256 of everything that decides tokens and pictures: weights and architecture."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in TRAINING_ONLY}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(inference_state(self).items()):
            array = tensor.detach().cpu().float().contiguous().numpy()
            digest.update(f"{name}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Write `config.json` and `model.safetensors`; moving averages are kept."""
        write_model_folder(folder, self, _MODEL_TYPE, self.config.to_dict())

    def save_config(self, folder: Path) -> None:
        """Write `config.json` alone: the weights come from elsewhere."""
        write_model_config(folder, _MODEL_TYPE, self.config.to_dict())

    @classmethod
    def from_pretrained(cls, folder: Union[str, Path]) -> VQVAE:
        """Read a folder written by `save_pretrained`, in eval mode on the CPU.

        Raises:
            CheckpointError: The folder is no VQ-VAE, or keys or shapes differ from its config.
        """
        values = read_model_config(
            folder,
            _MODEL_TYPE,
            kind="an lgpt VQ-VAE",
            folder_kind="a VQ-VAE folder",
            maker="Give the folder that `save_pretrained` or `lgpt convert` wrote.",
        )
        config = VQVAEConfig.from_dict(values)
        state, path = read_weights(folder)
        with torch.device("meta"):  # a damaged config must not lay out what the file does not hold
            expected = cls(config).state_dict()
        check_strictly(expected, state, path)
        model = cls(config)
        load_strictly(model, state, path)
        return model.eval()


def _whole_pixels(images: Tensor) -> Tensor:
    """8-bit pixels in [-1, 1], as they were before bf16 rounded them by a quarter of a step."""
    if images.dtype == torch.float32:
        return images
    return ((images.float() + 1) * 127.5).round() / 127.5 - 1


@contextmanager
def _whole_float32() -> Iterator[None]:
    """No TF32 (10 bits of mantissa for float32's 23), which cuDNN takes by default from Ampere on.

    The switches are tested on a CPU, where they decide nothing; what they change on a GPU is not.
    """
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(
            enabled=cudnn.enabled,
            benchmark=cudnn.benchmark,
            deterministic=cudnn.deterministic,
            allow_tf32=False,
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def inference_state(vqvae: VQVAE) -> dict[str, Tensor]:
    """The state dict without the quantizer's moving averages: exactly taming's keys."""
    return {k: v for k, v in vqvae.state_dict().items() if k not in MOVING_AVERAGES}
