"""Flickr30k through the library `datasets`: the hub's parquet files, local ones, or a saved set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import datasets
import pyarrow
import pyarrow.compute
from datasets.exceptions import DatasetGenerationError

from lgpt.core.errors import DataError
from lgpt.core.hub import hub_folder
from lgpt.data.flickr30k_table import (
    OFFLINE_WAYS,
    PARQUET_REVISION,
    CaptionTable,
    refuse_without_pictures,
    table_of_columns,
    text_columns,
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
        DataError: It cannot be read, or lacks columns.
    """
    try:
        saved: Union[datasets.Dataset, datasets.DatasetDict] = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{folder} was written by save_to_disk but cannot be read: {error}. Save it again."
        ) from error
    if not isinstance(saved, datasets.Dataset):
        saved = datasets.concatenate_datasets([saved[key] for key in sorted(saved)])
    return _table_of(saved, str(folder))


def open_hub(name: str, cache_folder: Optional[Path]) -> CaptionTable:
    """The parquet files of a hub dataset; from the local hub cache when there is no network.

    Args:
        cache_folder: Where files are kept, in folders as under HF_HOME; default HF_HOME itself.

    Raises:
        DataError: Neither hub nor cache has it; tells the ways without a hub.
    """
    try:
        folder = hub_folder(
            name,
            repo_type="dataset",
            revision=PARQUET_REVISION,
            choose=lambda files: [file for file in files if file.endswith(".parquet")],
            cache_folder=None if cache_folder is None else cache_folder / "hub",
        )
    except ConnectionError as error:
        raise DataError(
            f"The hub dataset {name} cannot be reached: {error}{OFFLINE_WAYS}"
        ) from error
    return open_parquet(folder, cache_folder)


def open_parquet(folder: Path, cache_folder: Optional[Path]) -> CaptionTable:
    """All parquet files below a folder; `datasets` keeps its Arrow form of them in its cache.

    Raises:
        DataError: There are none, or they cannot be read, or lack columns.
    """
    files = sorted(str(path) for path in folder.rglob("*.parquet"))
    if not files:
        raise DataError(
            f"{folder} holds no parquet files, no .token file and was not written by "
            f"save_to_disk.{OFFLINE_WAYS}"
        )
    cache = None if cache_folder is None else str(cache_folder / "datasets")
    try:
        table = datasets.Dataset.from_parquet(files, cache_dir=cache)
    except (pyarrow.ArrowInvalid, DatasetGenerationError) as error:
        raise DataError(f"The parquet files in {folder} cannot be read: {error}") from error
    assert isinstance(table, datasets.Dataset)
    return _table_of(table, str(folder))


def _table_of(table: datasets.Dataset, source: str) -> CaptionTable:
    refuse_without_pictures(table.column_names, source)
    table = table.cast_column("image", datasets.Image(decode=False))
    texts = table.select_columns(text_columns(table.column_names))
    pictures = _ArrowPictures(table.select_columns("image"))
    return table_of_columns(texts.to_dict(), table.column_names, source, pictures)
