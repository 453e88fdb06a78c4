"""A checkpoint of other ranks or another ZeRO stage, loaded into the engine that is here.

DeepSpeed's universal format (0.19.8) drops buffers and frozen parameters, gives every parameter
group the weight decay of the first one, fails across stages, and writes the whole state to the disk
once more. Here every rank reads from the shards what its own partition holds, straight into its
place; nothing is written. What was in the shards and what is in the engines then must have the same
checksum, parameter by parameter: of the float32 weights, both moments and the weights' average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from lgpt.checkpoint.agreement import on_all_ranks
from lgpt.checkpoint.zero_shards import AVERAGE, MASTER, MOMENTS, ZeroShards
from lgpt.core.distributed import is_rank_zero, rank, world_size
from lgpt.core.errors import CheckpointError
from lgpt.core.logging import get_logger
from lgpt.engine.average import WeightAverage
from lgpt.engine.masters import master_vectors, write_masters_through
from lgpt.engine.partitions import (
    Stretch,
    fixed_shapes,
    moment_vectors,
    part_everything,
    set_adam_steps,
    set_counters,
    stretches,
    swaps_to_disk,
    trained_shapes,
    write_fixed,
)
from lgpt.engine.ranks import sum_over_ranks

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_ELEMENTS_AT_ONCE = 1 << 18
# Odd, so that no product loses what it multiplies (splitmix64's, as signed 64-bit numbers).
_MULTIPLIERS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)

_log = get_logger(__name__)


def load_engine_elastically(
    engine: Any, folder: Path, average: Optional[WeightAverage] = None
) -> None:
    """Put an engine where the save's was, whatever ranks and ZeRO stage it had. All ranks call it.

    Parameter groups keep the numbers of this run's config (training/resume.py decides whose hold).

    Args:
        folder: The engine's folder in the checkpoint, its content compared with its digests.
        average: Of the weights, which the checkpoint has too.

    Raises:
        CheckpointError: On every rank: it is the checkpoint of another model, or what arrived is
            not what was read. The files are not touched.
    """
    found: list[ZeroShards] = []
    before: list[Tensor] = []
    vectors: dict[str, Sequence[Tensor]] = {}
    part_everything(engine)

    def read() -> None:
        shards = ZeroShards(folder)
        found.append(shards)
        _refuse_other_model(engine, shards)
        for piece in shards.fixed_pieces():
            write_fixed(engine, piece.name, piece.start, piece.values)
        vectors.update(_vectors(engine, shards, average))
        _take_my_parts(engine, shards, vectors)
        set_counters(engine, {name: shards.counter(name) for name in _COUNTERS})
        before.append(_sums_of_shards(shards, tuple(vectors), engine.device))
        if average is not None:
            average.updates = shards.average_updates()

    on_all_ranks(read, f"load {folder}")
    shards = found[0]
    write_masters_through(engine)
    after = _sums_of_engine(engine, list(shards.trained), vectors)
    _compare(shards, tuple(vectors), sum_over_ranks(before[0]), sum_over_ranks(after), folder)
    if is_rank_zero():
        _log.info(
            "%s: %s numbers of %d rank(s) at ZeRO-%d were cut anew for %d rank(s) at ZeRO-%d; "
            "checksums of their %s are equal",
            folder.name,
            f"{shards.num_parameters:,}",
            shards.ranks,
            shards.stage,
            world_size(),
            engine.zero_optimization_stage(),
            ", ".join(vectors),
        )


def checksum(values: Tensor, start: int) -> Tensor:
    """A number for the bits of float32 `values` [n] at places `start`... of a tensor; int64.

    Stretches may be summed in any order: the sum over all of a tensor (modulo 2^64) does not depend
    on how it was cut, and changes with any bit, and with any two elements that change places.
    """
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for first in range(0, values.numel(), _ELEMENTS_AT_ONCE):
        part = values[first : first + _ELEMENTS_AT_ONCE]
        bits = part.contiguous().view(torch.int32).to(torch.int64)
        places = torch.arange(start + first, start + first + len(bits), device=values.device)
        mixed = places.mul_(_MULTIPLIERS[0]).add_(bits)
        for multiplier in _MULTIPLIERS[1:]:
            # An arithmetic shift, which spreads as well as splitmix64's logical one.
            mixed = mixed.bitwise_xor_(mixed >> 30).mul_(multiplier)
        total += (mixed ^ (mixed >> 31)).sum()
    return total


def _refuse_other_model(engine: Any, shards: ZeroShards) -> None:
    if swaps_to_disk(engine):
        raise CheckpointError(
            "offload to nvme does not go with a change of ranks or ZeRO stage; take the "
            "checkpoint over with offload to cpu first, and switch back at its next save."
        )
    for kind, here, there in (
        ("trained", trained_shapes(engine), shards.trained),
        ("fixed", fixed_shapes(engine), shards.fixed),
    ):
        if here == there:
            continue
        names = sorted(n for n in {**here, **there} if here.get(n) != there.get(n))
        told = [f"{n} (saved {there.get(n)}, here {here.get(n)})" for n in names[:3]]
        raise CheckpointError(
            f"{len(names)} {kind} tensors are not those of the save: {', '.join(told)}. Train with "
            "the config.yaml that lies beside it, or start a new run under another name=."
        )


def _vectors(
    engine: Any, shards: ZeroShards, average: Optional[WeightAverage]
) -> dict[str, Sequence[Tensor]]:
    """Where everything goes that there is of a parameter; no moments before AdamW's first step."""
    vectors: dict[str, Sequence[Tensor]] = {
        MASTER: [vector.data for vector in master_vectors(engine)]
    }
    if shards.adam_steps() is not None:
        vectors.update({name: moment_vectors(engine, name) for name in MOMENTS})
    if average is not None:
        vectors[AVERAGE] = average.state().vectors
    return vectors


@torch.no_grad()
def _take_my_parts(
    engine: Any, shards: ZeroShards, vectors: Mapping[str, Sequence[Tensor]]
) -> None:
    """Copy out of every shard what this rank holds; only those pages of the files are read."""
    mine: dict[str, Stretch] = {stretch.name: stretch for stretch in stretches(engine)}
    for number in range(shards.ranks):
        for held in shards.held_by(number):
            stretch = mine.get(held.name)
            if stretch is None:
                continue
            length = held.parts[MASTER].numel()
            first = max(held.start, stretch.start)
            last = min(held.start + length, stretch.start + stretch.length)
            if first >= last:
                continue
            for kind, of_kind in vectors.items():
                source = held.parts[kind][first - held.start : last - held.start]
                target = stretch.of(of_kind)
                target[first - stretch.start : last - stretch.start].copy_(source)
    steps = shards.adam_steps()
    if steps is not None:
        set_adam_steps(engine, steps)


def _sums_of_shards(shards: ZeroShards, kinds: tuple[str, ...], device: Any) -> Tensor:
    """This rank's share of the checksums [parameter, kind] of what was saved."""
    rows = {name: row for row, name in enumerate(shards.trained)}
    sums = torch.zeros(len(rows), len(kinds), dtype=torch.int64)
    for number in range(rank(), shards.ranks, world_size()):
        for held in shards.held_by(number):
            for column, kind in enumerate(kinds):
                sums[rows[held.name], column] += checksum(held.parts[kind], held.start)
    return sums.to(device)


def _sums_of_engine(
    engine: Any, names: list[str], vectors: Mapping[str, Sequence[Tensor]]
) -> Tensor:
    """The same of what this rank's engine holds now."""
    rows = {name: row for row, name in enumerate(names)}
    sums = torch.zeros(len(rows), len(vectors), dtype=torch.int64, device=engine.device)
    for stretch in stretches(engine):
        for column, of_kind in enumerate(vectors.values()):
            part = checksum(stretch.of(of_kind), stretch.start)
            sums[rows[stretch.name], column] += part.to(engine.device)
    return sums


def _compare(
    shards: ZeroShards, kinds: tuple[str, ...], before: Tensor, after: Tensor, folder: Path
) -> None:
    wrong = (before != after).nonzero().tolist()
    if wrong:
        names = list(shards.trained)
        told = ", ".join(f"{kinds[column]} of {names[row]}" for row, column in wrong[:3])
        raise CheckpointError(
            f"What was loaded from {folder} is not what was read: {len(wrong)} checksums differ "
            f"({told}). The checkpoint is untouched; start with {shards.ranks} rank(s) at ZeRO-"
            f"{shards.stage}, as it was saved, and please report this."
        )
