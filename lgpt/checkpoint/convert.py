"""ZeRO shards to whole float32 weights, without DeepSpeed and without unpickling code.

How DeepSpeed (0.18 to 0.19.8) cuts the float32 masters of R ranks:
- ZeRO-1 and 2: a parameter group is one flat vector, its parameters one after the other (and
  padding); rank r holds the r-th of R equal pieces of it.
- ZeRO-3: every parameter is padded to a multiple of R and cut into R pieces; rank r holds the r-th
  piece of every parameter, one after the other, over the flat vectors of all groups.
Buffers, frozen parameters and the names of shared parameters stand in the model_states files.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from lgpt.core.errors import CheckpointError

_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(optim|model)_states\.pt$")


class _LossScalerStub:
    """Stands in for DeepSpeed's class; holds nothing that conversion needs."""


class _FragmentStub:
    """Stands in for DeepSpeed's class; holds nothing that conversion needs."""


class _ZeroStageStub(int):
    """Stands in for DeepSpeed's enum: the stage as a number."""


_STUBS: tuple[tuple[type, str, str], ...] = (
    (_LossScalerStub, "deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    (_FragmentStub, "deepspeed.utils.tensor_fragment", "fragment_address"),
    (_ZeroStageStub, "deepspeed.runtime.zero.config", "ZeroStageEnum"),
)
for _stub, _module, _name in _STUBS:
    # torch's safe loader looks an allowed class up by these two.
    _stub.__module__, _stub.__name__, _stub.__qualname__ = _module, _name, _name


@dataclass(frozen=True)
class _Shards:
    """All files of one engine, read: one entry a rank in `flat`, and at stage 3 in `models`."""

    stage: int
    flat: list[list[Tensor]]
    models: list[Mapping[str, Any]]
    alignment_paddings: Optional[Sequence[Sequence[int]]]

    @property
    def group_shapes(self) -> list[Mapping[str, torch.Size]]:
        shapes: list[Mapping[str, torch.Size]] = self.models[0]["param_shapes"]
        return shapes


def merged_weights(step_folder: Path, engine_name: str = "model") -> dict[str, Tensor]:
    """The whole state dict of one engine of a checkpoint.

    Args:
        step_folder: `checkpoints/step_<n>`.
        engine_name: Folder of the engine in it.

    Returns:
        Every parameter and buffer by its name, in the module's order: floating point as float32,
        integers as they are. Shared parameters are one tensor under several names.

    Raises:
        CheckpointError: A file is missing, unreadable or holds code, or names and sizes do not add
            up.
    """
    folder = step_folder / engine_name
    shards = _read_shards(folder)
    merge = _merged_parameters if shards.stage == 3 else _merged_groups
    try:
        weights = merge(shards)
    except (IndexError, RuntimeError) as error:
        raise CheckpointError(f"The shards in {folder} do not fit together: {error}.") from error
    names = list(shards.models[0]["module"])
    weights.update(_frozen_parameters(shards))
    weights.update(_buffers(shards.models[0]))
    for alias, original in shards.models[0]["shared_params"].items():
        if original in weights:
            weights[alias] = weights[original]
    missing, extra = sorted(set(names) - set(weights)), sorted(set(weights) - set(names))
    if missing or extra:
        raise CheckpointError(
            f"The shards in {folder} do not make up the model: missing {missing}, extra {extra}."
        )
    return {name: weights[name] for name in names}


def read_safely(path: Path) -> Any:
    """Read a torch file of a DeepSpeed checkpoint with tensors and plain values only.

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
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:300]}.") from error


@contextmanager
def _stubs_allowed() -> Iterator[None]:
    """Our stubs in place of DeepSpeed's classes, for the time of one load."""
    with torch.serialization.safe_globals([stub for stub, _, _ in _STUBS]):
        yield


def _core_of(error: Exception) -> str:
    """What torch's long message says was refused."""
    found = re.search(r"GLOBAL:? ([\w.]+)", str(error))
    return f"it names {found.group(1)}" if found else str(error).strip().splitlines()[-1][:200]


def _read_shards(folder: Path) -> _Shards:
    optimizer_files = _by_rank(folder, "optim")
    if not optimizer_files:
        raise CheckpointError(
            f"{folder} holds no ZeRO shards (*_optim_states.pt); give a step folder of a run that "
            "was trained with ZeRO stage 1, 2 or 3."
        )
    states = [read_safely(path).get("optimizer_state_dict", {}) for path in optimizer_files]
    if any("zero_stage" not in state or "partition_count" not in state for state in states):
        # DeepSpeed's BF16_Optimizer, which stage 1 in bf16 trains with, keeps neither.
        raise CheckpointError(
            f"{folder} was not saved by ZeRO stage 1 in fp32, 2 or 3 (its shards name no "
            "zero_stage), and only those can be converted; train with stage 2, such as "
            "deepspeed=zero2_bf16."
        )
    stage, partitions = int(states[0]["zero_stage"]), states[0]["partition_count"]
    expected = max(partitions) if isinstance(partitions, list) else int(partitions)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    model_files = (
        _by_rank(folder, "model") if stage == 3 else [folder / "mp_rank_00_model_states.pt"]
    )
    if len(states) != expected or (stage == 3 and len(model_files) != expected):
        raise CheckpointError(
            f"{folder} was saved by {expected} ranks but holds {len(states)} optimizer and "
            f"{len(model_files)} model shards."
        )
    if any(key not in state for state in states):
        raise CheckpointError(f"{folder} has shards without float32 weights ({key}).")
    return _Shards(
        stage,
        [[tensor.detach() for tensor in state[key]] for state in states],
        [read_safely(path) for path in model_files],
        states[0].get("param_alignment_paddings"),
    )


def _by_rank(folder: Path, kind: str) -> list[Path]:
    found = {}
    for path in folder.glob(f"*_{kind}_states.pt"):
        if match := _SHARD.search(path.name):
            found[int(match.group(1))] = path
    return [found[number] for number in sorted(found)]


def _merged_groups(shards: _Shards) -> dict[str, Tensor]:
    """ZeRO-1 and 2: a parameter is a stretch of its group's vector, which spans the ranks."""
    weights = {}
    for index, shapes in enumerate(shards.group_shapes):
        pieces = [flat[index] for flat in shards.flat]
        paddings = (
            shards.alignment_paddings[index] if shards.alignment_paddings else [0] * len(shapes)
        )
        offset = 0
        for (name, shape), padding in zip(shapes.items(), paddings):
            weights[name] = _stretch(pieces, offset, math.prod(shape)).view(shape)
            offset += math.prod(shape) + padding
        # DeepSpeed pads a group to a multiple of 2 x ranks elements.
        left = sum(piece.numel() for piece in pieces) - offset
        if not 0 <= left < 2 * len(pieces):
            raise CheckpointError(
                f"Parameter group {index} has {left} elements more than its parameters need."
            )
    return weights


def _merged_parameters(shards: _Shards) -> dict[str, Tensor]:
    """ZeRO-3: each parameter is one stretch of every rank's flat vectors."""
    ranks = len(shards.flat)
    weights, offset = {}, 0
    for name, shape in (item for shapes in shards.group_shapes for item in shapes.items()):
        length = math.ceil(math.prod(shape) / ranks)
        parts = [_stretch(flat, offset, length) for flat in shards.flat]
        weights[name] = torch.cat(parts)[: math.prod(shape)].view(shape)
        offset += length
    available = sum(tensor.numel() for tensor in shards.flat[0])
    if available != offset:
        raise CheckpointError(
            f"The shards hold {available} elements a rank, their parameters need {offset}."
        )
    return weights


def _stretch(pieces: Sequence[Tensor], start: int, length: int) -> Tensor:
    """`torch.cat(pieces)[start:start + length]` in float32, without building the concatenation."""
    parts, place, end = [], 0, start + length
    for piece in pieces:
        first, last = max(start - place, 0), min(end - place, piece.numel())
        if first < last:
            parts.append(piece[first:last].float())
        place += piece.numel()
    if end > place:
        raise IndexError(f"elements {start} to {end} of {place}")
    return torch.cat(parts) if parts else torch.empty(0)


def _frozen_parameters(shards: _Shards) -> dict[str, Tensor]:
    first = shards.models[0]
    shapes = first.get("frozen_param_shapes") or {}
    if shards.stage == 3:
        return {
            name: torch.cat(
                [model["frozen_param_fragments"][name].flatten() for model in shards.models]
            )
            .float()[: math.prod(shape)]
            .view(shape)
            for name, shape in shapes.items()
        }
    # ZeRO-1 and 2 keep the whole module: what the optimizer does not own is taken from there.
    owned = {name for group in shards.group_shapes for name in group}
    left = set(first["module"]) - owned - set(first["shared_params"]) - set(first["buffer_names"])
    return {name: first["module"][name].float() for name in left}


def _buffers(model: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {name: model["module"][name] for name in model["buffer_names"]}
    return {
        name: value.float() if value.is_floating_point() else value.clone()
        for name, value in found.items()
    }
