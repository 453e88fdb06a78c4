"""Validation of phase 2: every validation picture once, whatever the ranks and the micro batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lgpt.core.distributed import rank, world_size
from lgpt.data.image_batches import ImageBatches
from lgpt.data.transforms import to_unit_range
from lgpt.evaluation.reconstruction_scores import ReconstructionScores
from lgpt.settings.phases import Phase2
from lgpt.training.places import ValidationBatch, padded_batches_of

# Pictures in [-1, 1] in float32 to pictures as they come back, and their tokens.
Reconstruct = Callable[[Float[Tensor, "b 3 H W"]], tuple[Tensor, Tensor]]


@torch.no_grad()
def validate_vqvae(
    run: Phase2, pictures: ImageBatches, reconstruct: Reconstruct, device: torch.device
) -> ReconstructionScores:
    """Score what comes back of the first `training.validation_images` pictures.

    All ranks call it and call `reconstruct` equally often, with as many pictures: ZeRO-3 needs it.

    Args:
        run: Its micro batch, loss and codebook size.
        pictures: The validation split, the same on every rank.
        reconstruct: A model in eval mode; a collective where its weights are spread over ranks.
        device: Where pictures go.

    Returns:
        This rank's sums: `over_ranks` makes figures of them.
    """
    batches = padded_batches_of(
        min(run.training.validation_images, len(pictures)),
        micro_batch=run.batch.micro_batch_images,
        rank=rank(),
        world=world_size(),
    )
    scores = ReconstructionScores(run.vqvae.codebook_size, device, loss=run.loss.reconstruction)
    for number, batch in enumerate(batches):
        pixels = pictures.items(batch.items, np.zeros_like(batch.items))
        _read_ahead(pictures, batches[number + 1 : number + 2])
        images = to_unit_range(torch.from_numpy(pixels).to(device, non_blocking=True))
        reconstruction, tokens = reconstruct(images)
        is_counted = torch.from_numpy(batch.is_counted).to(device, non_blocking=True)
        scores.add(images, reconstruction, tokens, is_counted)
    return scores


def _read_ahead(pictures: ImageBatches, following: list[ValidationBatch]) -> None:
    for batch in following:
        pictures.prefetch(batch.items, np.zeros_like(batch.items))
