"""The state dict inside a PyTorch-Lightning .ckpt of taming-transformers, opened without trust."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.models.pytorch_file import read_pytorch_file, tensors_within
from lgpt.models.strict_loading import Layout

FIRST_STAGE = "first_stage_model."
# What stands beside a VQGAN's own tensors, and why it is not needed.
_IGNORED = {
    "loss.": "the loss (loss.*), which only training needs",
    "model_ema.": "moving averages (model_ema.*); the weights themselves are read",
}


class TamingLayout(Layout):
    """Our own key grammar, in second-stage files behind a prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def name(self, key: str) -> str:
        """With the prefix."""
        return self.prefix + key


def read_taming_state(path: Path) -> tuple[dict[str, Tensor], TamingLayout, dict[str, list[str]]]:
    """The VQGAN's tensors under the file's names, their layout, and what was left out by reason.

    Raises:
        CheckpointError: The file is damaged, would run code, or holds no VQGAN.
    """
    content = read_pytorch_file(path)
    content = content if isinstance(content, Mapping) else {}
    tensors = tensors_within(content.get("state_dict", content), path)
    prefix = FIRST_STAGE if any(name.startswith(FIRST_STAGE) for name in tensors) else ""
    if f"{prefix}quantize.embed.weight" in tensors:
        raise CheckpointError(
            f"{path} is a GumbelVQ (quantize.embed and quantize.proj), not a VQModel with "
            "quantize.embedding; its tokens are chosen in another way and cannot be read here."
        )
    llamagen = content.get("model")  # where its files keep their tensors
    if any(
        str(name).startswith("encoder.conv_blocks.")
        for name in (*tensors, *(llamagen if isinstance(llamagen, Mapping) else ()))
    ):
        raise CheckpointError(
            f"{path} is a LlamaGen VQ (encoder.conv_blocks), not a taming VQGAN; its source is "
            "pretrained_llamagen."
        )
    if not any(name.startswith(f"{prefix}encoder.") for name in tensors):
        keys = ", ".join(str(key)[:60] for key in list(content)[:5]) if content else "nothing"
        raise CheckpointError(
            f"{path} holds no taming VQGAN: it has no encoder.* tensors, but {keys}."
        )
    return _sorted_out(tensors, prefix)


def _sorted_out(
    tensors: dict[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], TamingLayout, dict[str, list[str]]]:
    kept: dict[str, Tensor] = {}
    ignored: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            reason: object = f"the second stage (not {prefix}*)"
        else:
            own = name[len(prefix) :]
            reason = next((why for part, why in _IGNORED.items() if own.startswith(part)), None)
        if reason is None:
            kept[name] = tensor
        else:
            ignored.setdefault(str(reason), []).append(name)
    return kept, TamingLayout(prefix), ignored
