"""PyTorch files from elsewhere, opened without trust: tensors and plain values, never code."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.core.files import refuse_lfs_pointer

# Names that honest checkpoints carry; each becomes an empty class that is never called. Lightning
# 1.x keys its `callbacks` by these classes, LlamaGen keeps its command line as a Namespace.
_NAMED_IN_CHECKPOINTS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "pytorch_lightning.callbacks.lr_logger.LearningRateLogger",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.progress.ProgressBar",
    "main.SetupCallback",
    "main.ImageLogger",
    "main.CUDACallback",
    "argparse.Namespace",
)
_COPY_AGAIN = "Copy or download it again."


def read_pytorch_file(path: Path) -> Any:
    """What `torch.save` put into a file, on the CPU, whatever device it was saved from.

    Raises:
        CheckpointError: The file is missing, damaged, or would run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not there, or is not a file.")
    _refuse_other_kinds(path)
    _refuse_damaged_zip(path)
    return _load_as_data(path)


def tensors_within(values: object, path: Path) -> dict[str, Tensor]:
    """The named tensors of a mapping, other values left out.

    Raises:
        CheckpointError: They claim more numbers than the file can hold: a tensor may be a small
            storage seen many times, or its storage may be shorter than it says.
    """
    items = values.items() if isinstance(values, Mapping) else ()
    tensors = {str(name): value for name, value in items if isinstance(value, Tensor)}
    held = path.stat().st_size
    left = held
    for name, tensor in tensors.items():
        left -= tensor.numel() * tensor.element_size()
        if left < 0:
            raise CheckpointError(
                f"{path} holds {held:,} bytes, but its tensors up to {name} "
                f"{list(tensor.shape)} claim more. {_COPY_AGAIN}"
            )
    return tensors


def _refuse_other_kinds(path: Path) -> None:
    # torch's unpickler takes the first byte of any file for an opcode, and blames that.
    refuse_lfs_pointer(path)
    with path.open("rb") as stream:
        head = stream.read(16)
    if head and not head.startswith((b"PK", b"\x80")):  # a zip, or a pickle in the old format
        raise CheckpointError(f"{path} is not a PyTorch file: it begins with {head!r}.")


def _refuse_damaged_zip(path: Path) -> None:
    # torch does not look at the CRC of each part: flipped bits in a weight load without a word.
    try:
        if not zipfile.is_zipfile(path):
            return  # an old-format file, or cut off: torch.load finds out which
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing; a part larger than the file would fill the memory.
            claimed = sum(part.file_size for part in archive.infolist())
            if claimed > path.stat().st_size:
                raise CheckpointError(
                    f"{path} is no file of torch.save: its parts claim {claimed:,} bytes, the "
                    f"file has {path.stat().st_size:,}. {_COPY_AGAIN}"
                )
            damaged = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # zipfile meets damage with errors of many kinds (zlib, struct, ...)
        raise CheckpointError(f"{path} is damaged: {_first_words(error)}. {_COPY_AGAIN}") from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: the checksum of {damaged} is wrong. {_COPY_AGAIN}"
        )


def _stub(full_name: str) -> type:
    """A class that bears another's name, holds nothing and does nothing."""
    module, name = full_name.rsplit(".", 1)
    return type(name, (), {"__module__": module})


def _load_as_data(path: Path) -> Any:
    stubs = [_stub(name) for name in _NAMED_IN_CHECKPOINTS]
    try:
        with torch.serialization.safe_globals(stubs), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats and pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged opcodes fail as whatever they happen to ask for
        if wished := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(_refusal(path, wished[1])) from error
        if opcode := re.search(r"Unsupported operand (\d+)", str(error)):
            raise CheckpointError(
                f"{path} was not opened: its pickle uses opcode {opcode[1]}, which no file of "
                f"torch.save needs and which may serve to run code. {_COPY_AGAIN}"
            ) from error
        raise CheckpointError(
            f"{path} is not a PyTorch file that can be read as data: {_first_words(error)}. "
            f"{_COPY_AGAIN}"
        ) from error


def _first_words(error: Exception) -> str:
    # torch puts a paragraph of advice around the one sentence that counts.
    text = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
    return re.split(r"\. |\n", text)[0].rstrip(".")[:200]


def _refusal(path: Path, wished: str) -> str:
    return (
        f"{path} asks for {wished} when it is opened, which can run code, so it was not opened; "
        "weights are data. If you trust whoever made it, load it where that code lives and save "
        "its tensors alone: torch.save({'state_dict': state_dict}, 'weights.ckpt')."
    )
