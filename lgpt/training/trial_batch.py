"""A micro batch of noise before the first step: what does not fit shows in the first minute.

On CUDA only: elsewhere the system ends a process that takes too much, and nobody can ask first.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Optional

import torch

from lgpt.core.distributed import world_size
from lgpt.core.errors import OutOfMemoryError
from lgpt.engine.ranks import max_over_ranks
from lgpt.settings.training import BatchSettings


def refuse_what_does_not_fit(
    trial_batch: Callable[[int], None], batch: BatchSettings, device: torch.device
) -> None:
    """Try the micro batch, and when it does not fit, smaller ones. All ranks call it.

    Args:
        trial_batch: Forward and backward of so many pictures of noise, changing nothing.

    Raises:
        OutOfMemoryError: On every rank, when any ran out of memory; names the largest micro batch
            that fits and divides the global batch.
    """

    def fits(images: int) -> bool:
        return _fits_on_all_ranks(trial_batch, images, device)

    micro = batch.micro_batch_images
    if fits(micro):
        return
    share = batch.global_batch_images // world_size()
    smaller = [images for images in range(1, micro) if share % images == 0]
    largest = largest_that_fits(smaller, fits)
    start = f"A micro batch of {micro} pictures does not fit on the device (tried on noise); "
    if largest is None:
        raise OutOfMemoryError(
            f"{start}nor does a single one: more ranks or a higher ZeRO stage hold less of the "
            "optimizer each, a lower data.resolution or vqvae.ch makes pictures cheaper."
        )
    raise OutOfMemoryError(
        f"{start}{largest} do: set batch.micro_batch_images to {largest} (the global batch of "
        f"{batch.global_batch_images} stays: accumulation makes up for it)."
    )


def largest_that_fits(candidates: list[int], fits: Callable[[int], bool]) -> Optional[int]:
    """The largest of ascending candidates that fits, by halving; None when not even the first.

    Args:
        fits: True up to some candidate, False from there on.
    """
    low, high = 0, len(candidates)  # all before `low` fit, none from `high` on
    while low < high:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle + 1
        else:
            high = middle
    return candidates[low - 1] if low else None


def _fits_on_all_ranks(
    trial_batch: Callable[[int], None], images: int, device: torch.device
) -> bool:
    ran_out = 0.0
    try:
        trial_batch(images)
    except torch.OutOfMemoryError:
        ran_out = 1.0
    gc.collect()  # the exception held the frames that hold the tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return max_over_ranks({"ran_out": ran_out}, device)["ran_out"] == 0
