"""Flickr30k: 31,014 photographs with five captions each.

The hub's `nlphuji/flickr30k` is a script, which `datasets` >= 4 refuses, so its parquet conversion
(revision refs/convert/parquet) is read; or a local folder: those parquet files, a set written by
`save_to_disk`, or the original captions and pictures. The hub has everything in one split named
`test`; the real one (29,000, 1,014 and 1,000 pictures) is in the column `split`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Union

from PIL import Image

from lgpt.core.errors import DataError
from lgpt.data.captioned import BadImage, decode_image
from lgpt.data.flickr30k_datasets import is_saved_dataset, open_hub, open_parquet, open_saved
from lgpt.data.flickr30k_files import is_original_layout, open_original
from lgpt.data.flickr30k_stream import stream_folder, stream_hub
from lgpt.data.flickr30k_table import DEFAULT_SOURCE, OFFLINE_WAYS, CaptionTable
from lgpt.data.splits import SPLIT_NAMES
from lgpt.settings.data import DataSettings


class Flickr30kDataset:
    """One split of Flickr30k, or of any dataset with the same columns."""

    name = "flickr30k"

    def __init__(self, split: str, settings: DataSettings) -> None:
        """
        Raises:
            DataError: Neither hub nor disk has it, it lacks columns, or this split is empty.
        """
        self.split = split
        source = settings.source or DEFAULT_SOURCE
        table = _open(source, settings)
        splits = table.splits
        self._rows = [row for row, found in enumerate(splits) if SPLIT_NAMES.get(found) == split]
        if not self._rows:
            raise DataError(
                f"{source} has no pictures in split '{split}'; its column 'split' has "
                f"{dict(Counter(splits))}."
            )
        self._captions = [_cleaned(table.captions[row]) for row in self._rows]
        self._ids = [table.ids[row] for row in self._rows]
        self._pictures = table.pictures
        self.fingerprint = self._digest()

    def __len__(self) -> int:
        return len(self._rows)

    def image_id(self, index: int) -> str:
        """File name on Flickr, such as 1000092795.jpg."""
        return self._ids[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """The five captions."""
        return self._captions[index]

    def load(self, index: int) -> Image.Image:
        """The photograph, RGB."""
        picture = self._pictures.picture(self._rows[index])
        if picture is None:
            raise BadImage(f"{self._ids[index]}: the row has no picture")
        return decode_image(picture, self._ids[index])

    def _digest(self) -> str:
        """Of ids, captions and sizes of the pictures (of whole parquet files when streaming)."""
        contents = self._pictures.contents()
        digest = hashlib.sha256()
        for row, image_id, captions in zip(self._rows, self._ids, self._captions):
            digest.update(json.dumps([image_id, captions, contents[row]]).encode())
        return digest.hexdigest()


def _open(source: str, settings: DataSettings) -> CaptionTable:
    """All rows of all splits, pictures not decoded."""
    folder = Path(source)
    if folder.is_dir():
        if settings.streaming:
            return stream_folder(folder)
        if is_saved_dataset(folder):
            return open_saved(folder)
        if is_original_layout(folder):
            return open_original(folder)
        return open_parquet(folder, settings.cache_folder)
    if folder.exists() or source.startswith((".", "/", "~")):
        raise DataError(f"data.source {source} is not a folder.{OFFLINE_WAYS}")
    return stream_hub(source) if settings.streaming else open_hub(source, settings.cache_folder)


def _cleaned(captions: Union[str, list[str]]) -> tuple[str, ...]:
    texts = [captions] if isinstance(captions, str) else captions
    return tuple(" ".join(text.split()) for text in texts)
