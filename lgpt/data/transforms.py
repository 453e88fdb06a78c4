"""From a picture of any size to a square of pixels, repeatably; and between pixels and [-1, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lgpt.data.order import philox_generator

# Keeps crops apart from the sample order, which uses the same seed.
_CROP_STREAM = 2
_WORD = float(2**64)


class ImageTransform:
    """Cuts a square out of a picture and resizes it (bicubic, antialiased), repeatably.

    Crop 0 with `crop_scale_min` 1 is the classic one: shorter side to `resolution`, centre cut out.
    Every other crop has a random side between crop_scale_min and 1 times the shorter side and a
    random place, which follow from (seed, index, crop). With `flip`, crops 1, 3, 5... are mirrored.

    Args:
        resolution: Side of the result in pixels.
        crops: How many different crops a picture has.
        crop_scale_min: Smallest side of the cut as a fraction of the shorter side, in (0, 1].
        flip: Mirror every second crop left to right.
        seed: Other seeds give other crops.
    """

    def __init__(
        self, resolution: int, crops: int, crop_scale_min: float, flip: bool, seed: int
    ) -> None:
        self.resolution, self.crops = resolution, crops
        self.crop_scale_min, self.flip, self.seed = crop_scale_min, flip, seed

    def __call__(self, image: Image.Image, index: int, crop: int) -> UInt8[np.ndarray, "3 H W"]:
        """Crop `crop` (0 .. crops - 1) of the RGB picture with this index, as pixels 0..255."""
        assert 0 <= crop < self.crops, (crop, self.crops)
        square = image.resize(
            (self.resolution, self.resolution),
            Image.Resampling.BICUBIC,
            box=self._box(image.width, image.height, index, crop),
        )
        pixels = np.asarray(square, dtype=np.uint8)
        if self.flip and crop % 2 == 1:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _box(
        self, width: int, height: int, index: int, crop: int
    ) -> tuple[float, float, float, float]:
        """Left, upper, right, lower edge of the square cut, in source pixels."""
        shorter = min(width, height)
        if crop == 0 and self.crop_scale_min == 1:
            side, across, down = float(shorter), 0.5, 0.5
        else:
            stream = philox_generator(self.seed, _CROP_STREAM, index, crop)
            scale, across, down = (float(word) / _WORD for word in stream.random_raw(3))
            side = shorter * (self.crop_scale_min + (1 - self.crop_scale_min) * scale)
        left, upper = (width - side) * across, (height - side) * down
        return left, upper, min(left + side, width), min(upper + side, height)

    def describe(self) -> dict[str, Any]:
        """All that decides the pixels, for fingerprints."""
        return {
            "resolution": self.resolution,
            "crops": self.crops,
            "crop_scale_min": self.crop_scale_min,
            "flip": self.flip,
            "seed": self.seed,
            "resize": "bicubic, antialiased",
        }


def validation_transform(resolution: int) -> ImageTransform:
    """One centre crop, nothing random."""
    return ImageTransform(resolution, crops=1, crop_scale_min=1.0, flip=False, seed=0)


def to_unit_range(pixels: UInt8[Tensor, "*batch 3 H W"]) -> Float[Tensor, "*batch 3 H W"]:
    """Pixels 0..255 to float32 in [-1, 1], on the same device: x / 127.5 - 1."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_pil(images: Float[Tensor, "batch 3 H W"]) -> list[Image.Image]:
    """Images in [-1, 1] to RGB pictures; values outside are clamped."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]
