"""Pictures in a folder without captions: what a VQ-VAE is measured on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from PIL import Image

from lgpt.core.errors import DataError
from lgpt.data.captioned import decode_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class PictureFolder:
    """A picture, or all pictures of a folder and its sub folders, by name.

    A `CaptionedDataset` whose captions are the names.
    """

    name, split = "pictures", "all"

    def __init__(self, place: Path) -> None:
        """
        Raises:
            DataError: It is not there, or no file in it is called like a picture.
        """
        if not place.exists():
            raise DataError(
                f"{place} is not there; give --images a picture or a folder of pictures."
            )
        self._root = place.parent if place.is_file() else place
        paths = [place] if place.is_file() else sorted(place.rglob("*"))
        self._paths = [p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not self._paths:
            raise DataError(
                f"{place} holds no picture that can be read ({', '.join(SUFFIXES)}); give --images "
                "a picture or a folder of pictures."
            )

    @property
    def fingerprint(self) -> str:
        """Of names and file sizes."""
        digest = hashlib.sha256()
        for index, path in enumerate(self._paths):
            digest.update(json.dumps([self.image_id(index), path.stat().st_size]).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def image_id(self, index: int) -> str:
        """Path relative to the folder."""
        return self._paths[index].relative_to(self._root).as_posix()

    def captions(self, index: int) -> tuple[str, ...]:
        """Its name."""
        return (self.image_id(index),)

    def load(self, index: int) -> Image.Image:
        """The picture, RGB, upright."""
        return decode_image(self._paths[index], self.image_id(index))
