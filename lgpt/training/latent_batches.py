"""Batches of latents for the transformer: from the cache, or encoded on the fly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from lgpt.data.captioned import CaptionedDataset
from lgpt.data.image_batches import ImageBatches
from lgpt.data.latent_cache import CachedBatch, CaptionEncoder, ImageEncoder
from lgpt.data.order import SampleOrder
from lgpt.data.transforms import to_unit_range

# Independent streams of choices from one seed: which crop, which caption, dropped or not.
_CROP_STREAM, _CAPTION_STREAM, _DROP_STREAM = 1, 2, 3
_DROP_STEPS = 1_000_000


@dataclass(frozen=True)
class LatentBatch:
    """Tokens and captions of n images, and which of the captions are dropped."""

    latents: CachedBatch
    null_text: Bool[Tensor, " n"]

    def to(self, device: torch.device, dtype: torch.dtype) -> LatentBatch:
        """On the device that trains, the text in the weights' type."""
        tokens = self.latents.tokens.to(device, non_blocking=True)
        text, mask = self.latents.text, self.latents.text_mask
        text = None if text is None else text.to(device, dtype, non_blocking=True)
        mask = None if mask is None else mask.to(device)
        return LatentBatch(CachedBatch(tokens, text, mask), self.null_text.to(device))


@runtime_checkable
class LatentSource(Protocol):
    """Where latents come from: a split of the latent cache, or the encoders."""

    def __len__(self) -> int: ...

    def batch(self, items: np.ndarray, crops: np.ndarray, captions: np.ndarray) -> CachedBatch:
        """Chosen crops and captions of n items."""

    def num_captions(self, item: int) -> int: ...

    @property
    def crops(self) -> int: ...


class EncodedLatents:
    """The same without a cache: the frozen encoders run at every step."""

    def __init__(
        self,
        dataset: CaptionedDataset,
        images: ImageBatches,
        crops: int,
        encode_images: ImageEncoder,
        encode_captions: Optional[CaptionEncoder],
    ) -> None:
        self._dataset, self._images, self.crops = dataset, images, crops
        self._encode_images, self._encode_captions = encode_images, encode_captions

    def __len__(self) -> int:
        return len(self._dataset)

    def num_captions(self, item: int) -> int:
        return len(self._dataset.captions(item))

    def batch(self, items: np.ndarray, crops: np.ndarray, captions: np.ndarray) -> CachedBatch:
        pictures = to_unit_range(torch.from_numpy(self._images.items(items, crops)))
        tokens = self._encode_images(pictures).flatten(1)
        if self._encode_captions is None:
            return CachedBatch(tokens, None, None)
        # A bad picture was replaced by another: its captions belong to that one.
        shown = (self._dataset.captions(int(item)) for item in self._images.shown(items))
        texts = [of_item[int(c) % len(of_item)] for of_item, c in zip(shown, captions)]
        return CachedBatch(tokens, *self._encode_captions(texts))


class TrainingLatents:
    """The endless training sequence: place -> image, crop, caption, and is the caption dropped.

    All of it follows from (seed, place), so it does not depend on the number of ranks and a resumed
    run reads on exactly where it stopped. One caption and one crop an image are drawn an epoch.
    """

    def __init__(self, source: LatentSource, seed: int, cond_drop: float) -> None:
        self._source, self._cond_drop = source, cond_drop
        self._order = SampleOrder(len(source), seed)
        self._crop_order = SampleOrder(len(source), seed + _CROP_STREAM)
        self._caption_order = SampleOrder(len(source), seed + _CAPTION_STREAM)
        self._drop_order = SampleOrder(len(source), seed + _DROP_STREAM)

    def at(self, places: np.ndarray) -> LatentBatch:
        """The samples at these places [n] of the sequence."""
        start, count = int(places[0]), len(places)
        items = self._order.indices(start, count)
        num_captions = np.array([self._source.num_captions(int(item)) for item in items])
        latents = self._source.batch(
            items,
            self._crop_order.choices(start, count, np.full(count, self._source.crops)),
            self._caption_order.choices(start, count, num_captions),
        )
        draws = self._drop_order.choices(start, count, np.full(count, _DROP_STEPS))
        dropped = draws < self._cond_drop * _DROP_STEPS
        return LatentBatch(latents, torch.from_numpy(dropped))


def validation_batch(source: LatentSource, items: np.ndarray) -> LatentBatch:
    """Centre crop and first caption of these items; nothing dropped."""
    zeros = np.zeros(len(items), dtype=np.int64)
    dropped = torch.zeros(len(items), dtype=torch.bool)
    return LatentBatch(source.batch(items, zeros, zeros), dropped)
