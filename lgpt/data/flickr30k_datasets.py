"""Flickr30k through the library `datasets`: the hub's parquet files, local ones, or a saved set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

import datasets
import pyarrow
import pyarrow.compute
from datasets.exceptions import DatasetGenerationError

from lgpt.core.errors import DataError
from lgpt.data.flickr30k_table import (
    OFFLINE_WAYS,
    PARQUET_REVISION,
    CaptionTable,
    refuse_without_pictures,
    table_of_columns,
)

_ROWS_A_TIME = 1000


class _ArrowPictures:
    """The column `image`, not decoded."""

    def __init__(self, images: datasets.Dataset) -> None:
        self._images = images

    def picture(self, row: int) -> Union[Path, bytes, None]:
        image = self._images[row]["image"]
        if image is None:
            return None
        return Path(image["path"]) if image["bytes"] is None else image["bytes"]

    def contents(self) -> list[Union[int, str, None]]:
        """Sizes in bytes: reading all 4 GB would take a minute."""
        sizes: list[Any] = []
        for batch in self._images.with_format("arrow").iter(_ROWS_A_TIME):
            for chunk in batch["image"].chunks:
                # Lengths come from the offsets; combining chunks would read and copy the pictures.
                column = chunk.flatten()[chunk.type.get_field_index("bytes")]
                sizes += pyarrow.compute.binary_length(column).to_pylist()
        return sizes


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def open_saved(folder: Path) -> CaptionTable:
    """A Dataset or a DatasetDict written by `save_to_disk`.

    Raises:
        DataError: It lacks columns.
    """
    saved: Union[datasets.Dataset, datasets.DatasetDict] = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.Dataset):
        saved = datasets.concatenate_datasets([saved[key] for key in sorted(saved)])
    return _table_of(saved, str(folder))


def open_hub(name: str) -> CaptionTable:
    """The parquet files of a hub dataset; from the local hub cache when there is no network.

    Raises:
        DataError: Neither hub nor cache has it; tells the ways without a hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, repo_type="dataset", revision=PARQUET_REVISION, allow_patterns=["*.parquet"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"The hub dataset {name} cannot be reached: {first_line}{OFFLINE_WAYS}"
        ) from error
    return open_parquet(Path(folder))


def open_parquet(folder: Path) -> CaptionTable:
    """All parquet files below a folder.

    Raises:
        DataError: There are none, or they cannot be read, or lack columns.
    """
    files = sorted(str(path) for path in folder.rglob("*.parquet"))
    if not files:
        raise DataError(
            f"{folder} holds no parquet files and was not written by save_to_disk.{OFFLINE_WAYS}"
        )
    try:
        table = datasets.load_dataset("parquet", data_files=files, split="train")
    except (pyarrow.ArrowInvalid, DatasetGenerationError) as error:
        raise DataError(f"The parquet files in {folder} cannot be read: {error}") from error
    return _table_of(table, str(folder))


def _table_of(table: datasets.Dataset, source: str) -> CaptionTable:
    refuse_without_pictures(table.column_names, source)
    table = table.cast_column("image", datasets.Image(decode=False))
    texts = table.select_columns([name for name in table.column_names if name != "image"])
    pictures = _ArrowPictures(table.select_columns("image"))
    return table_of_columns(texts.to_dict(), source, pictures)
