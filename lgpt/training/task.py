"""What the loop asks of a phase: the loop knows when, the task knows how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, Protocol, runtime_checkable

import torch
from PIL import Image


@runtime_checkable
class TrainingTask(Protocol):
    """One phase's step functions around its engine."""

    engine: Any
    """The engine of the model that is exported; the loop sets its learning rate."""

    main_loss: str
    """Name of the metric that the report shows."""

    finite_losses: tuple[str, ...]
    """Names of the metrics that must stay finite, where a step has them; the main loss is one."""

    tokens_per_image: int
    """Latent tokens an image, for tokens/s."""

    training_images: int
    """Images of an epoch."""

    def content(self) -> dict[str, Optional[str]]:
        """Digests of what the run reads: its pictures, the VQ-VAE, the latent cache, the text."""

    def build_engines(self, ds_config: dict[str, Any]) -> None:
        """Wrap everything that is trained in DeepSpeed engines."""

    def engines(self) -> dict[str, Any]:
        """Every engine by the name of its folder in a checkpoint; "model" is the exported one."""

    def state(self) -> dict[str, Any]:
        """JSON values that later steps depend on, beside engines and generators.

        The same on every rank; every checkpoint holds them.
        """

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be where `state` was taken; empty when the checkpoint is of a version without."""

    def train_step(self, step: int) -> Mapping[str, float]:
        """One optimizer step on the global batch number `step`; this rank's mean metrics."""

    def probe(self) -> Mapping[str, torch.Tensor]:
        """A few inputs and the model's outputs, kept with every checkpoint; may be empty.

        All ranks call it. `lgpt convert --verify` compares (checkpoint/logits_check.py).
        """

    def validate(self) -> Mapping[str, float]:
        """Metrics over the validation images and all ranks; the same on every rank."""

    def draw(self, step: int) -> Mapping[str, Image.Image]:
        """Named pictures for people to look at; all ranks call it, rank 0 gets the pictures."""
