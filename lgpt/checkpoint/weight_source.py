"""Whole tensors that lie in pieces: what conversion reads from, whatever wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from lgpt.core.errors import CheckpointError


class TensorInfo(NamedTuple):
    """A whole tensor's shape, and the dtype in which its pieces come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Piece(NamedTuple):
    """A stretch of a tensor in row-major order: `values` [n] are its elements from `start` on."""

    name: str
    start: int
    values: Tensor


@runtime_checkable
class WeightSource(Protocol):
    """Named tensors that are handed out piece by piece, so that they need not fit into memory."""

    tensors: Mapping[str, TensorInfo]
    """Every stored tensor, in the module's order."""

    aliases: Mapping[str, str]
    """Further names of stored tensors (tied weights), to the name it is stored under."""

    names: list[str]
    """All names, aliases too, in the module's order."""

    def pieces(self) -> Iterator[Piece]:
        """Every element of every tensor once; a piece is gone when the next one is asked for."""


class Counted:
    """Counts the elements that came, to notice what a source left out or gave twice."""

    def __init__(self, source: WeightSource) -> None:
        self._left = {name: info.elements for name, info in source.tensors.items()}

    def take(self, piece: Piece) -> None:
        """Count one piece."""
        self._left[piece.name] -= piece.values.numel()

    def finish(self) -> None:
        """Raise CheckpointError unless every tensor is whole."""
        if wrong := {name: left for name, left in self._left.items() if left}:
            name, left = next(iter(wrong.items()))
            raise CheckpointError(
                f"The shards do not make up {len(wrong)} tensors; {name} lacks {left} elements."
            )


def whole_tensors(source: WeightSource) -> dict[str, Tensor]:
    """Everything in memory; aliases are the same tensor under another name."""
    weights = {
        name: torch.empty(info.shape, dtype=info.dtype) for name, info in source.tensors.items()
    }
    counted = Counted(source)
    for piece in source.pieces():
        flat = weights[piece.name].view(-1)
        flat[piece.start : piece.start + piece.values.numel()] = piece.values
        counted.take(piece)
    counted.finish()
    return {name: weights[source.aliases.get(name, name)] for name in source.names}
