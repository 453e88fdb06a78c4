"""What the loop asks of a phase: the loop knows when, the task knows how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from PIL import Image


@runtime_checkable
class TrainingTask(Protocol):
    """One phase's step functions around its engine."""

    engine: Any
    main_loss: str
    """Name of the metric that must stay finite and that the report shows."""

    tokens_per_image: int
    """Latent tokens an image, for tokens/s."""

    def train_step(self, step: int) -> Mapping[str, float]:
        """One optimizer step on the global batch number `step`; this rank's mean metrics."""

    def validate(self) -> Mapping[str, float]:
        """Metrics over the validation images and all ranks; the same on every rank."""

    def draw(self, step: int) -> Mapping[str, Image.Image]:
        """Named pictures for people to look at; all ranks call it, rank 0 gets the pictures."""
