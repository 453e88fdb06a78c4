"""Crops against a slow resize written out, and pixels to [-1, 1] and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lgpt.data.transforms import ImageTransform, to_pil, to_unit_range, validation_transform


def _noise(width: int, height: int) -> Image.Image:
    rng = np.random.RandomState(width * 1000 + height)
    coarse = Image.fromarray(rng.randint(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BILINEAR)


def _bicubic(distance: float) -> float:
    """Keys' kernel with a = -0.5."""
    x = abs(distance)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def _weights(source: int, first: float, side: float, target: int) -> np.ndarray:
    """Antialiased bicubic: the kernel is widened by the shrinking factor. [target, source]."""
    scale = side / target
    wide = max(scale, 1.0)
    rows = []
    for out in range(target):
        centre = first + (out + 0.5) * scale
        row = np.array([_bicubic((pixel + 0.5 - centre) / wide) for pixel in range(source)])
        rows.append(row / row.sum())
    return np.array(rows)


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (40, 40), (20, 30)])
def test_centre_crop_matches_a_resize_written_out(width: int, height: int):
    image = _noise(width, height)
    side = min(width, height)
    across = _weights(width, (width - side) / 2, side, 24)
    down = _weights(height, (height - side) / 2, side, 24)
    slow = np.einsum("yh,hwc,xw->cyx", down, np.asarray(image, float), across).clip(0, 255)
    fast = validation_transform(24)(image, index=5, crop=0)
    assert fast.shape == (3, 24, 24)
    assert np.abs(fast - slow).max() <= 1.01  # PIL rounds to whole levels twice.


def test_centre_crop_is_resize_shorter_side_then_cut():
    image = _noise(64, 48)
    classic = np.asarray(image.resize((32, 24), Image.Resampling.BICUBIC).crop((4, 0, 28, 24)))
    ours = validation_transform(24)(image, index=0, crop=0).transpose(1, 2, 0)
    assert np.abs(ours.astype(int) - classic.astype(int)).max() <= 1


def test_crops_are_repeatable_and_follow_seed_index_and_crop():
    image = _noise(60, 40)
    transform = ImageTransform(16, crops=3, crop_scale_min=0.5, flip=False, seed=1)
    first = transform(image, 7, 2)
    other_seed = ImageTransform(16, crops=3, crop_scale_min=0.5, flip=False, seed=2)
    assert (first == transform(image, 7, 2)).all()
    for other in (transform(image, 8, 2), transform(image, 7, 1), other_seed(image, 7, 2)):
        assert (first != other).any()


def test_crop_sides_and_places_are_uniform_and_inside_the_picture():
    # A picture whose pixels are their own coordinates: the crop's corners can be read off.
    down, across = np.mgrid[0:100, 0:200]
    image = Image.fromarray(np.stack([across, down, down * 0], -1).astype(np.uint8))
    transform = ImageTransform(64, crops=400, crop_scale_min=0.5, flip=False, seed=0)
    cuts = [transform(image, 0, crop).astype(float) for crop in range(400)]
    sides = np.array([(cut[1, -1, 5] - cut[1, 0, 5]) * 64 / 63 for cut in cuts])
    centres = np.array([cut[0].mean() for cut in cuts])
    assert 48 <= sides.min() < 53
    assert 97 < sides.max() <= 102
    assert abs(sides.mean() - 75) < 3
    assert 24 <= centres.min() < 50
    assert 150 < centres.max() <= 176
    assert abs(centres.mean() - 99.5) < 6


def test_every_second_crop_is_mirrored():
    image = _noise(32, 32)
    plain = ImageTransform(16, crops=4, crop_scale_min=0.6, flip=False, seed=0)
    mirrored = ImageTransform(16, crops=4, crop_scale_min=0.6, flip=True, seed=0)
    for crop in range(4):
        expected = plain(image, 3, crop)
        expected = expected[:, :, ::-1] if crop in (1, 3) else expected
        assert (mirrored(image, 3, crop) == expected).all()


def test_pixels_survive_the_way_to_unit_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = to_unit_range(pixels)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert (np.asarray(to_pil(images)[1]) == pixels[1].permute(1, 2, 0).numpy()).all()


def test_to_pil_clamps_what_a_decoder_overshoots():
    [picture] = to_pil(torch.tensor([-1.7, 0.0, 1.7]).reshape(1, 3, 1, 1))
    assert picture.getpixel((0, 0)) == (0, 128, 255)
