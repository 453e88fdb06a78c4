"""Which places of the training or validation sequence a rank works on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class ValidationBatch(NamedTuple):
    """One rank's pictures of one call.

    Attributes:
        items: Their numbers.
        is_counted: False where a picture only makes the batch as large as the others.
    """

    items: np.ndarray
    is_counted: np.ndarray


def micro_batches_of(
    step: int, *, global_batch: int, micro_batch: int, rank: int, world: int
) -> list[np.ndarray]:
    """The places of one rank's micro batches in optimizer step `step`.

    Step s reads the places [s x global, (s+1) x global) whatever the number of ranks, so the images
    of a step stay the same when it changes. `global_batch` is a multiple of `micro_batch x world`.
    """
    start = step * global_batch
    stride = micro_batch * world
    return [
        np.arange(first + rank * micro_batch, first + (rank + 1) * micro_batch)
        for first in range(start, start + global_batch, stride)
    ]


def crops_of(items: np.ndarray, epochs: np.ndarray, crops: int) -> np.ndarray:
    """Which crop of each picture an epoch shows: another one every epoch, until all were shown.

    Pictures begin at different crops, so every epoch mirrors half of them.
    """
    # Knuth's multiplier spreads neighbours; its upper bits, or items of one parity would stay so.
    firsts = (items.astype(np.uint64) * np.uint64(2654435761)) >> np.uint64(16)
    return ((firsts + epochs.astype(np.uint64)) % np.uint64(crops)).astype(np.int64)


def validation_batches_of(
    num_items: int, *, wanted: int, micro_batch: int, rank: int, world: int
) -> list[np.ndarray]:
    """Equal numbers of equal batches for every rank, from the first `wanted` items.

    What does not fill a batch on every rank is left out (collectives must match); with fewer items
    than ranks, items are used more than once.
    """
    count = min(wanted, num_items)
    size = max(1, min(micro_batch, count // world))
    rounds = max(1, count // (size * world))
    return [
        np.arange((r * world + rank) * size, (r * world + rank + 1) * size) % num_items
        for r in range(rounds)
    ]


def padded_batches_of(
    num_items: int, *, micro_batch: int, rank: int, world: int
) -> list[ValidationBatch]:
    """Every item exactly once over all ranks, in equally many batches of one size on each of them.

    Batches are filled evenly, so at most one item of each is padding, which repeats item 0.
    """
    rounds = -(-num_items // (micro_batch * world))
    parts = np.array_split(np.arange(num_items), rounds * world)
    size = len(parts[0])
    return [
        ValidationBatch(
            np.concatenate([part, np.zeros(size - len(part), part.dtype)]),
            np.arange(size) < len(part),
        )
        for part in parts[rank::world]
    ]
