"""The moving average of a model's weights, kept where the float32 masters are.

With ZeRO every rank holds a part of the masters; it keeps the average of that part, in float32 and
in the same flat vectors (masters.py). So a step needs no message for it, and no rank holds more
than its share. Buffers and frozen parameters have none: they are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lgpt.engine.masters import master_vectors, write_masters_through
from lgpt.engine.rows import set_rows

_EXCHANGED_AT_A_TIME = 1 << 24  # elements: 64 MiB


class AverageState(NamedTuple):
    """What the average of one rank is.

    Attributes:
        vectors: Float32, flat; their number, lengths and order are those of this rank's masters in
            DeepSpeed's checkpoint, so without padding where that leaves it out (stage 1 and 2).
        updates: Steps that it has followed.
        decay: Of the run.
    """

    vectors: list[Tensor]
    updates: int
    decay: float


def decay_at(update: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)) for update n = 1, 2, ...: what is young follows quickly.

    Source: LitEma of latent diffusion, github.com/CompVis/latent-diffusion, ldm/modules/ema.py.
    """
    return min(decay, (1 + update) / (10 + update))


class WeightAverage:
    """The exponential moving average of an engine's masters, as far as this rank holds them.

    Args:
        engine: A DeepSpeedEngine with its first weights; the average starts there.
        decay: Share of the average that a step leaves, once it is warm (`decay_at`).
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._engine = engine
        self._vectors = [master.detach().clone() for master in master_vectors(self._engine)]
        assert all(vector.dtype == torch.float32 for vector in self._vectors)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the optimizer step that was just taken; one that DeepSpeed skipped moves nothing.

        average <- decay * average + (1 - decay) * weights
        """
        if self._engine.optimizer.overflow:
            return
        self.updates += 1
        weight = 1 - decay_at(self.updates, self.decay)
        for average, master in zip(self._vectors, master_vectors(self._engine)):
            average.lerp_(master, weight)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew at the weights of now."""
        self.updates = 0
        for average, master in zip(self._vectors, master_vectors(self._engine)):
            average.copy_(master)

    def set_rows(
        self,
        parameter: nn.Parameter,
        rows: Int[Tensor, " n"],
        values: Float[Tensor, "n dim"],
    ) -> None:
        """Put rows into the average too, after `rows.set_rows` with the same. All ranks call it."""
        with self.in_use():
            set_rows(self._engine, parameter, rows, values)

    def state(self) -> AverageState:
        """What a checkpoint keeps of it: the living tensors, not copies."""
        optimizer, vectors = self._engine.optimizer, self._vectors
        if hasattr(optimizer, "_get_groups_without_padding"):
            vectors = optimizer._get_groups_without_padding(vectors)
        return AverageState(vectors, self.updates, self.decay)

    @torch.no_grad()
    def load(self, vectors: Sequence[Tensor], updates: int) -> None:
        """Take back what `state` gave, on an engine of the same cut.

        Raises:
            ValueError: The vectors are not cut as this rank's masters are.
        """
        own = self.state().vectors
        lengths = [vector.numel() for vector in own], [vector.numel() for vector in vectors]
        if lengths[0] != lengths[1]:
            raise ValueError(f"the average holds {lengths[1]} elements, the masters {lengths[0]}")
        for average, saved in zip(own, vectors):
            average.copy_(saved)
        self.updates = updates

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The model computes with the average inside, and with its own weights, bit for bit, after.

        All ranks enter and leave it. Nothing may be trained or saved inside. After an exception the
        weights are not put back: that needs all ranks, and the others may never come.
        """
        self._exchange()
        yield
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Masters and average change places, and the module's weights follow the masters."""
        for average, master in zip(self._vectors, master_vectors(self._engine)):
            pieces = (each.split(_EXCHANGED_AT_A_TIME) for each in (average, master.detach()))
            for mine, its in zip(*pieces):
                kept = its.clone()
                its.copy_(mine)
                mine.copy_(kept)
        write_masters_through(self._engine)


@contextmanager
def averaged_weights(average: Optional[WeightAverage]) -> Iterator[None]:
    """`average.in_use()`, or nothing where there is no average."""
    if average is None:
        yield
        return
    with average.in_use():
        yield
