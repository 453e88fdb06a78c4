"""Flickr30k: 31,014 photographs with five captions each.

The hub's `nlphuji/flickr30k` is a script, which `datasets` >= 4 refuses, so its parquet conversion
(revision refs/convert/parquet) is read; or a local folder, written by `save_to_disk` or holding
those parquet files. The hub has everything in one split named `test`; the real one (29,000, 1,014
and 1,000 pictures) is in the column `split`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Union

import datasets
import pyarrow
import pyarrow.compute
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from lgpt.core.errors import DataError
from lgpt.data.captioned import BadImage, decode_image
from lgpt.data.splits import SPLIT_NAMES
from lgpt.settings.data import DataSettings

DEFAULT_SOURCE = "nlphuji/flickr30k"
_PARQUET_REVISION = "refs/convert/parquet"
_CAPTION_COLUMNS = ("caption", "captions")
_ID_COLUMNS = ("filename", "img_id")
_ROWS_A_TIME = 1000


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
        table = _open(source)
        texts = table.select_columns([name for name in table.column_names if name != "image"])
        columns: dict[str, list[Any]] = texts.to_dict()
        splits, captions, ids = _checked_columns(columns, table.column_names, source)
        self._rows = [row for row, found in enumerate(splits) if SPLIT_NAMES.get(found) == split]
        if not self._rows:
            raise DataError(
                f"{source} has no pictures in split '{split}'; its column 'split' has "
                f"{dict(Counter(splits))}."
            )
        self._captions = [_cleaned(captions[row]) for row in self._rows]
        self._ids = [ids[row] for row in self._rows]
        self._images = table.select_columns("image")
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
        image = self._images[self._rows[index]]["image"]
        if image is None:
            raise BadImage(f"{self._ids[index]}: the row has no picture")
        source = Path(image["path"]) if image["bytes"] is None else image["bytes"]
        return decode_image(source, self._ids[index])

    def _digest(self) -> str:
        """Of ids, captions and sizes in bytes of the pictures: reading all 4 GB takes a minute."""
        sizes: list[Any] = []
        for batch in self._images.with_format("arrow").iter(_ROWS_A_TIME):
            for chunk in batch["image"].chunks:
                # Lengths come from the offsets; combining chunks would read and copy the pictures.
                column = chunk.flatten()[chunk.type.get_field_index("bytes")]
                sizes += pyarrow.compute.binary_length(column).to_pylist()
        digest = hashlib.sha256()
        for row, image_id, captions in zip(self._rows, self._ids, self._captions):
            digest.update(json.dumps([image_id, captions, sizes[row]]).encode())
        return digest.hexdigest()


def _open(source: str) -> datasets.Dataset:
    """All rows of all files, pictures not decoded."""
    folder = Path(source)
    if folder.is_dir():
        is_saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
        table = _from_disk(folder) if is_saved else _from_parquet(folder)
    elif folder.exists() or source.startswith((".", "/", "~")):
        raise DataError(f"data.source {source} is not a folder.{_WAYS}")
    else:
        table = _from_parquet(_download(source))
    if "image" not in table.column_names:
        raise DataError(f"{source} has no column 'image'; its columns are {table.column_names}.")
    return table.cast_column("image", datasets.Image(decode=False))


_WAYS = f"""
Flickr30k can be had without the hub in two ways; give either folder as data.source:
  - parquet files, downloaded elsewhere by
      hf download {DEFAULT_SOURCE} --repo-type dataset \\
        --revision {_PARQUET_REVISION} --local-dir DIR
  - a dataset saved by `datasets.Dataset.save_to_disk(DIR)` with the columns
    image, caption, split and filename."""


def _download(name: str) -> Path:
    """The parquet files of a hub dataset; from the local hub cache when there is no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, repo_type="dataset", revision=_PARQUET_REVISION, allow_patterns=["*.parquet"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"The hub dataset {name} cannot be reached: {first_line}{_WAYS}") from error
    return Path(folder)


def _from_parquet(folder: Path) -> datasets.Dataset:
    files = sorted(str(path) for path in folder.rglob("*.parquet"))
    if not files:
        raise DataError(
            f"{folder} holds no parquet files and was not written by save_to_disk.{_WAYS}"
        )
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train")
    except (pyarrow.ArrowInvalid, DatasetGenerationError) as error:
        raise DataError(f"The parquet files in {folder} cannot be read: {error}") from error


def _from_disk(folder: Path) -> datasets.Dataset:
    saved: Union[datasets.Dataset, datasets.DatasetDict] = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        return saved
    return datasets.concatenate_datasets([saved[key] for key in sorted(saved)])


def _checked_columns(
    columns: dict[str, list[Any]], names: list[str], source: str
) -> tuple[list[str], list[Any], list[str]]:
    """Splits, captions and ids of all rows."""
    caption = next((name for name in _CAPTION_COLUMNS if name in columns), None)
    missing = [] if caption else ["caption"]
    missing += [] if "split" in columns else ["split"]
    if caption is None or missing:
        raise DataError(
            f"{source} lacks the column(s) {', '.join(missing)}; its columns are {names}. "
            "For other pictures use data.dataset=folder."
        )
    id_column = next((name for name in _ID_COLUMNS if name in columns), None)
    rows = range(len(columns["split"]))
    ids = [str(columns[id_column][row]) if id_column else f"row {row}" for row in rows]
    return columns["split"], columns[caption], ids


def _cleaned(captions: Union[str, list[str]]) -> tuple[str, ...]:
    texts = [captions] if isinstance(captions, str) else captions
    return tuple(" ".join(text.split()) for text in texts)
