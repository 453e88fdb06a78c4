"""The state dict inside a PyTorch-Lightning .ckpt of taming-transformers, opened without trust."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgpt.core.errors import CheckpointError

_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
_FIRST_STAGE = "first_stage_model."


# Lightning 1.x keys its `callbacks` by these classes; only ever named, never called.
_NAMED_BY_LIGHTNING = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "pytorch_lightning.callbacks.lr_logger.LearningRateLogger",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.progress.ProgressBar",
    "main.SetupCallback",
    "main.ImageLogger",
)


def read_taming_state(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The VQGAN's own tensors, in float32, and remarks on what was left out.

    Raises:
        CheckpointError: The file is damaged, would run code, or holds no VQGAN.
    """
    _refuse_damaged_zip(path)
    content = _load_as_data(path)
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


def _refuse_damaged_zip(path: Path) -> None:
    # torch does not look at the CRC of each part: flipped bits in a weight load without a word.
    try:
        if not zipfile.is_zipfile(path):
            return  # an old-format file, or cut off: torch.load finds out which
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy or download it again.") from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: the checksum of {damaged} is wrong. Copy or download it again."
        )


def _stub(full_name: str) -> type:
    """A class that bears another's name, holds nothing and does nothing."""
    module, name = full_name.rsplit(".", 1)
    return type(name, (), {"__module__": module})


def _load_as_data(path: Path) -> Any:
    stubs = [_stub(name) for name in _NAMED_BY_LIGHTNING]
    try:
        with torch.serialization.safe_globals(stubs), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:
        if wished := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(_refusal(path, wished[1])) from error
        # torch puts a paragraph of advice around the one sentence that counts.
        text = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
        reason = re.split(r"\. |\n", text)[0].rstrip(".")
        raise CheckpointError(
            f"{path} is not a PyTorch file that can be read as data: {reason}. Copy or download "
            "it again."
        ) from error


def _refusal(path: Path, wished: str) -> str:
    return (
        f"{path} asks for {wished} when it is opened, which can run code, so it was not opened; "
        "weights are data. If you trust whoever made it, load it where that code lives and save "
        "its tensors alone: torch.save({'state_dict': state_dict}, 'weights.ckpt')."
    )
