"""Validation of phase 2: every validation picture once, whatever the ranks and the micro batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lgpt.core.distributed import rank, world_size
from lgpt.data.image_batches import ImageBatches
from lgpt.data.transforms import to_unit_range
from lgpt.evaluation.frechet import FeatureSums
from lgpt.evaluation.judges import find_judges
from lgpt.evaluation.reconstruction_scores import ReconstructionScores
from lgpt.settings.phases import Phase2
from lgpt.training.places import ValidationBatch, padded_batches_of

# Pictures in [-1, 1] in float32 to pictures as they come back, and their tokens.
Reconstruct = Callable[[Float[Tensor, "b 3 H W"]], tuple[Tensor, Tensor]]


class VqvaeValidation:
    """Scores whatever reconstructs on the first `training.validation_images` pictures.

    Args:
        run: Its micro batch, loss, codebook size and metrics.
        pictures: The validation split, the same on every rank.
        device: Where pictures go.
    """

    def __init__(self, run: Phase2, pictures: ImageBatches, device: torch.device) -> None:
        self._run, self._pictures, self._device = run, pictures, device
        self._judges = find_judges(
            device,
            side=run.data.resolution,
            wants_lpips=run.metrics.lpips == "auto",
            wants_rfid=run.metrics.rfid == "auto",
            vgg16_weights=run.loss.vgg16_weights,
            lpips_weights=run.loss.lpips_weights,
            inception_weights=run.metrics.inception_weights,
        )
        self._originals: Optional[FeatureSums] = None

    @torch.no_grad()
    def scores_of(self, reconstruct: Reconstruct) -> tuple[dict[str, float], Tensor]:
        """Figures over the pictures of all ranks, and how often each code was used.

        All ranks call it and call `reconstruct` equally often, with as many pictures: ZeRO-3 needs
        it.

        Args:
            reconstruct: A model in eval mode; a collective where its weights are spread over ranks.

        Returns:
            `ReconstructionScores.over_ranks` and its `code_counts`, the same on every rank.
        """
        run, device = self._run, self._device
        batches = padded_batches_of(
            min(run.training.validation_images, len(self._pictures)),
            micro_batch=run.batch.micro_batch_images,
            rank=rank(),
            world=world_size(),
        )
        scores = ReconstructionScores(
            run.vqvae.codebook_size,
            device,
            loss=run.loss.reconstruction,
            judges=self._judges,
            originals=self._originals,
        )
        for number, batch in enumerate(batches):
            pixels = self._pictures.items(batch.items, np.zeros_like(batch.items))
            self._read_ahead(batches[number + 1 : number + 2])
            images = to_unit_range(torch.from_numpy(pixels).to(device, non_blocking=True))
            is_counted = torch.from_numpy(batch.is_counted).to(device, non_blocking=True)
            reconstruction, tokens = reconstruct(images)
            scores.add(images, reconstruction, tokens, is_counted)
        figures = scores.over_ranks()
        self._originals = scores.originals
        return figures, scores.code_counts

    def _read_ahead(self, following: list[ValidationBatch]) -> None:
        for batch in following:
            self._pictures.prefetch(batch.items, np.zeros_like(batch.items))
