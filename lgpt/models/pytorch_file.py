"""PyTorch files from elsewhere, opened without trust: tensors and plain values, never code."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from lgpt.core.errors import CheckpointError

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


def read_pytorch_file(path: Path) -> Any:
    """What `torch.save` put into a file, on the CPU.

    Raises:
        CheckpointError: The file is damaged, or would run code.
    """
    _refuse_damaged_zip(path)
    return _load_as_data(path)


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
