"""Pictures and captions on one sheet."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lgpt.sampling.picture_grid import picture_grid


def test_grid_enlarges_small_pictures_pixel_by_pixel_and_writes_captions() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pictures = [Image.new("RGB", (32, 32), colour) for colour in colours]
    pictures[0].putpixel((0, 0), (0, 0, 0))
    bare = np.asarray(picture_grid(pictures))
    for colour in colours[1:]:
        assert (bare == colour).all(axis=2).sum() == 128 * 128
    assert (bare == colours[0]).all(axis=2).sum() == 128 * 128 - 16, "one pixel became 4 x 4"
    long = "a very long caption that does not fit under a picture, with 猫 in it"
    captioned = picture_grid(pictures, [long, "b", ""], columns=3)
    assert captioned.width == 3 * (128 + 8) + 8
    assert captioned.height > bare.shape[0] // 2 + 14
    below = np.asarray(captioned)[8 + 128 :, : 8 + 128]
    assert (below < 128).any(), "the caption is written under its picture"
    with pytest.raises(ValueError, match="2 captions for 3 pictures"):
        picture_grid(pictures, ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        picture_grid([])


def test_large_pictures_keep_their_size() -> None:
    assert picture_grid([Image.new("RGB", (200, 150))]).size == (200 + 16, 150 + 16)
