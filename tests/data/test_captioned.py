"""RGB from all kinds of files, and the limit on bad pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgpt.core.errors import DataError
from lgpt.data.captioned import BadImage, BadImages, as_rgb, decode_image


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    rgb = as_rgb(image)
    assert rgb.mode == "RGB"
    assert (rgb.getpixel((0, 0)), rgb.getpixel((1, 0))) == ((255, 0, 0), (255, 255, 255))


def test_16_bit_greys_keep_their_shades(tmp_path: Path):
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(shades * 257).save(tmp_path / "scan.png")  # 257 = 65,535 / 255
    found = np.asarray(as_rgb(Image.open(tmp_path / "scan.png")))
    assert np.array_equal(found, np.repeat(shades[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_every_mode_becomes_rgb(mode: str):
    assert as_rgb(Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)).getpixel((1, 1)) == (
        255,
        255,
        255,
    )


def test_cameras_orientation_is_undone(tmp_path: Path):
    image = Image.fromarray(np.zeros((10, 20, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotated by 90 degrees.
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode_image(tmp_path / "a.jpg", "a").size == (10, 20)


def test_missing_truncated_and_foreign_files_are_bad_images(tmp_path: Path):
    noise = np.random.RandomState(0).randint(0, 255, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    (tmp_path / "text.png").write_text("not a picture")
    for name, reason in (("none", "no such file"), ("cut", "truncat"), ("text", "identify")):
        with pytest.raises(BadImage, match=f"{name}.png: .*{reason}"):
            decode_image(tmp_path / f"{name}.png", f"{name}.png")


def test_bad_images_are_counted_once_and_named_when_there_are_too_many():
    bad = BadImages(limit=2, dataset="toy/train")
    for image_id in ("a", "b", "a"):
        bad.skip(image_id, f"{image_id}: truncated")
    assert len(bad) == 2
    assert "2 corrupt or missing pictures in toy/train" in bad.summary()
    with pytest.raises(DataError, match=r"(?s)a: trunc.*b: trunc.*c: gone.*max_bad_images \(2\)"):
        bad.skip("c", "c: gone")
