"""A small dataset of coloured noise for tests of batches and caches."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lgpt.data.captioned import BadImage


class ToyPictures:
    """`count` pictures of 30 x 20 with one to three captions; those in `bad` cannot be read."""

    name = "toy"
    split = "train"
    fingerprint = "ab12"

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self._count, self.bad, self.loads = count, bad, 0

    def __len__(self) -> int:
        return self._count

    def image_id(self, index: int) -> str:
        return f"picture{index}"

    def captions(self, index: int) -> tuple[str, ...]:
        words = ["red", "green", "blue", "cat", "dog", "big"]
        texts = [" ".join(words[: 1 + (index + k) % 6]) for k in range(1 + index % 3)]
        return (f"number {index}", *texts)

    def load(self, index: int) -> Image.Image:
        self.loads += 1
        if index in self.bad:
            raise BadImage(f"picture{index}: truncated")
        rng = np.random.RandomState(index)
        return Image.fromarray(rng.randint(0, 256, (20, 30, 3), dtype=np.uint8))
