"""The state dict inside a PyTorch-Lightning .ckpt of taming-transformers, opened without trust."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.models.pytorch_file import read_pytorch_file

_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
_FIRST_STAGE = "first_stage_model."


def read_taming_state(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The VQGAN's own tensors, in float32, and remarks on what was left out.

    Raises:
        CheckpointError: The file is damaged, would run code, or holds no VQGAN.
    """
    content = read_pytorch_file(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    tensors = {k: v for k, v in (state or {}).items() if isinstance(v, Tensor)}
    if any(key.startswith(_FIRST_STAGE) for key in tensors):  # a second-stage (Net2Net) file
        tensors = {
            key[len(_FIRST_STAGE) :]: value
            for key, value in tensors.items()
            if key.startswith(_FIRST_STAGE)
        }
    if "quantize.embed.weight" in tensors:
        raise CheckpointError(
            f"{path} is a GumbelVQ (quantize.embed and quantize.proj), not a VQModel with "
            "quantize.embedding; its tokens are chosen in another way and cannot be read here."
        )
    if not any(key.startswith("encoder.") for key in tensors):
        keys = ", ".join(str(key) for key in list(content)[:5]) if content else "nothing"
        raise CheckpointError(
            f"{path} holds no taming VQGAN: it has no encoder.* tensors, but {keys}."
        )
    ignored = [key for key in tensors if key.startswith("loss.")]
    kept = {key: value.float() for key, value in tensors.items() if not key.startswith("loss.")}
    bad = [key for key, value in kept.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"{path} holds numbers that are not finite, first in {bad[0]}.")
    remarks = [f"left out {len(ignored)} tensors of the loss (loss.*)"] if ignored else []
    return kept, tuple(remarks)
