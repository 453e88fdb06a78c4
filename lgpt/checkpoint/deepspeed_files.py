"""DeepSpeed's checkpoint files, opened without DeepSpeed and without unpickling code."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lgpt.core.errors import CheckpointError

_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(optim|model)_states\.pt$")


class _LossScalerStub:
    """Stands in for DeepSpeed's class; holds nothing that conversion needs."""


class _FragmentStub:
    """Stands in for DeepSpeed's class; holds nothing that conversion needs."""


class _ZeroStageStub(int):
    """Stands in for DeepSpeed's enum: the stage as a number."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _named_stage(owner: object, name: object) -> _ZeroStageStub:
    """Stands in for `getattr`, by which Python 3.11.0 to 3.11.3 pickle an enum's member."""
    if owner is not _ZeroStageStub or not isinstance(name, str) or name not in _STAGES:
        raise pickle.UnpicklingError("GLOBAL getattr")
    return _ZeroStageStub(_STAGES[name])


_STUBS: tuple[tuple[Any, str, str], ...] = (
    (_LossScalerStub, "deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    (_FragmentStub, "deepspeed.utils.tensor_fragment", "fragment_address"),
    (_ZeroStageStub, "deepspeed.runtime.zero.config", "ZeroStageEnum"),
    (_named_stage, "builtins", "getattr"),
)
for _stub, _module, _name in _STUBS:
    # torch's safe loader looks an allowed class or function up by these two.
    _stub.__module__, _stub.__name__, _stub.__qualname__ = _module, _name, _name

# What torch's safe loader stumbles over where a byte of the pickle is another one.
_DAMAGED = (AssertionError, AttributeError, LookupError, TypeError, struct.error)


def read_safely(path: Path) -> Any:
    """Read a torch file of a DeepSpeed checkpoint with tensors and plain values only.

    The tensors are mapped from the file: only those that are looked at come into memory.

    Raises:
        CheckpointError: It is missing or damaged, or names a class or function unknown here.
    """
    try:
        with _stubs_allowed():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and is not read: {_core_of(error)}."
        ) from error
    except (*_DAMAGED, OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:300]}.") from error


def files_by_rank(folder: Path, kind: str) -> list[Path]:
    """The `optim` or `model` shards of an engine's folder, in rank order."""
    found = {}
    for path in folder.glob(f"*_{kind}_states.pt"):
        if match := _SHARD.search(path.name):
            found[int(match.group(1))] = path
    return [found[number] for number in sorted(found)]


@contextmanager
def _stubs_allowed() -> Iterator[None]:
    """Our stubs in place of DeepSpeed's classes, for the time of one load."""
    with torch.serialization.safe_globals([stub for stub, _, _ in _STUBS]):
        yield


def _core_of(error: Exception) -> str:
    """What torch's long message says was refused."""
    found = re.search(r"GLOBAL:? ([\w.]+)", str(error))
    return f"it names {found.group(1)}" if found else str(error).strip().splitlines()[-1][:200]
