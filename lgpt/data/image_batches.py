"""Batches of decoded, cut pictures: threads, a memory of small sets, and bad pictures replaced."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Optional

import numpy as np
from jaxtyping import UInt8

from lgpt.core.errors import DataError
from lgpt.data.captioned import BadImage, BadImages, CaptionedDataset
from lgpt.data.transforms import ImageTransform

_MEMORY_BUDGET_BYTES = 2 << 30


class ImageBatches:
    """Pictures of a dataset as uint8 batches.

    All crops stay in memory once they were read when the whole set at this resolution takes less
    than 2 GB a rank. A corrupt or missing picture is replaced by the next good one of the dataset,
    always the same one.

    Args:
        dataset: One split.
        transform: Which crops there are.
        workers: Threads that read and cut; 0 reads in the caller's thread.
        max_bad_images: Bad pictures this rank may meet before it is an error.
    """

    def __init__(
        self,
        dataset: CaptionedDataset,
        transform: ImageTransform,
        *,
        workers: int,
        max_bad_images: int,
    ) -> None:
        self.dataset, self.transform = dataset, transform
        self.bad_images = BadImages(max_bad_images, f"{dataset.name}/{dataset.split}")
        self._is_bad: set[int] = set()
        self._pool = ThreadPoolExecutor(workers, "lgpt-images") if workers > 0 else None
        self._ahead: dict[tuple[int, int], Future[np.ndarray]] = {}
        side = transform.resolution
        self._shape = (len(dataset), transform.crops, 3, side, side)
        self._memory: Optional[np.ndarray] = None
        self._is_remembered: Optional[np.ndarray] = None
        if int(np.prod(self._shape, dtype=np.int64)) <= _MEMORY_BUDGET_BYTES:
            # Pages are only taken when a picture is written into them.
            self._memory = np.empty(self._shape, np.uint8)
            self._is_remembered = np.zeros(self._shape[:2], bool)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.dataset)

    def items(self, items: np.ndarray, crops: np.ndarray) -> UInt8[np.ndarray, "n 3 H W"]:
        """Crop `crops[k]` of picture `items[k]`, in order.

        Raises:
            DataError: More bad pictures than allowed.
        """
        wanted = [(int(item), int(crop)) for item, crop in zip(items, crops)]
        self._submit(wanted)
        batch = np.empty((len(wanted), *self._shape[2:]), np.uint8)
        for place, key in enumerate(wanted):
            reading = self._ahead.get(key)
            batch[place] = self._read(*key) if reading is None else reading.result()
        for key in wanted:
            self._ahead.pop(key, None)
        return batch

    def prefetch(self, items: np.ndarray, crops: np.ndarray) -> None:
        """Begin to read what the next `items` call will want, in the background."""
        self._submit((int(item), int(crop)) for item, crop in zip(items, crops))

    def shown(self, items: np.ndarray) -> np.ndarray:
        """Items whose pictures `items()` gave for these: another one where the picture was bad.

        Captions must be taken from these. Known after the pictures were read.
        """
        return np.array([self._good_from(int(item)) for item in items], dtype=np.int64)

    def _submit(self, wanted: Iterable[tuple[int, int]]) -> None:
        if self._pool is None:
            return
        for key in wanted:
            is_known = self._is_remembered is not None and self._is_remembered[key]
            if key not in self._ahead and not is_known:
                self._ahead[key] = self._pool.submit(self._read, *key)

    def _read(self, item: int, crop: int) -> np.ndarray:
        item = self._good_from(item)
        while True:
            try:
                return self._read_one(item, crop)
            except BadImage as error:
                self.bad_images.skip(self.dataset.image_id(item), str(error))
                with self._lock:
                    self._is_bad.add(item)
                item = self._good_from(item)

    def _good_from(self, item: int) -> int:
        if item not in self._is_bad:
            return item
        for step in range(1, len(self.dataset)):
            following = (item + step) % len(self.dataset)
            if following not in self._is_bad:
                return following
        raise DataError(
            f"Not one picture can be read.\n{self.bad_images.summary()}\nMend or remove them."
        )

    def _read_one(self, item: int, crop: int) -> np.ndarray:
        if self._memory is None or self._is_remembered is None:
            return self.transform(self.dataset.load(item), item, crop)
        if not self._is_remembered[item, crop]:
            self._memory[item, crop] = self.transform(self.dataset.load(item), item, crop)
            self._is_remembered[item, crop] = True
        return self._memory[item, crop]
