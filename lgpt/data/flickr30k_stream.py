"""Flickr30k read from parquet files a row group at a time, so that no picture stays on the disk.

`lgpt prepare` asks for pictures in order; two groups of some hundred rows are held in memory, and
only the latent cache is written. Splits and captions are read at once (tens of MB), without the
column of the pictures.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Union
from urllib.parse import quote

import numpy as np
import pyarrow
import pyarrow.parquet

from lgpt.core.errors import DataError
from lgpt.data.flickr30k_table import (
    OFFLINE_WAYS,
    PARQUET_REVISION,
    CaptionTable,
    refuse_without_pictures,
    table_of_columns,
    text_columns,
)

_GROUPS_IN_MEMORY = 2
# A file that was not written for streaming may have all its pictures in one group.
LARGEST_GROUP_BYTES = 512 << 20
_BYTES_COLUMN = "image.bytes"


@dataclass(frozen=True)
class _Shard:
    """One parquet file; `size` in bytes."""

    name: str
    size: int
    file: Any


class _StreamedPictures:
    """Pictures by row; neighbours come from the same row group, which is read once."""

    def __init__(self, shards: list[_Shard], source: str) -> None:
        self._shards, self._source = shards, source
        self._groups = [(s, g) for s in shards for g in range(s.file.num_row_groups)]
        rows = [s.file.metadata.row_group(g).num_rows for s, g in self._groups]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def picture(self, row: int) -> Union[Path, bytes, None]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            column = self._group(number)
        value = column[row - int(self._starts[number])].as_py()
        return None if value is None else value["bytes"]

    def contents(self) -> list[Union[int, str, None]]:
        """Each row's file and its size: a picture's own size cannot be had without reading it."""
        of_shards = ([f"{s.name}:{s.size}"] * s.file.metadata.num_rows for s in self._shards)
        return [text for texts in of_shards for text in texts]

    def _group(self, number: int) -> Any:
        if number not in self._held:
            shard, group = self._groups[number]
            try:
                column = shard.file.read_row_group(group, columns=["image"]).column("image")
            except Exception as error:  # of pyarrow, or of the hub by its release
                raise DataError(
                    f"The stream of {self._source} broke off in {shard.name}, row group {group}: "
                    f"{_first_line(error)}. The same command goes on where it was."
                ) from error
            self._held[number] = column.combine_chunks()
        self._held.move_to_end(number)
        while len(self._held) > _GROUPS_IN_MEMORY:
            self._held.popitem(last=False)
        return self._held[number]


def stream_hub(name: str) -> CaptionTable:
    """The parquet files of a hub dataset, where they are.

    Raises:
        DataError: The hub cannot be reached, or as `_table_of`.
    """
    from huggingface_hub import HfFileSystem

    try:
        system = HfFileSystem()
        root = f"datasets/{name}@{quote(PARQUET_REVISION, safe='')}"
        paths = sorted(system.glob(f"{root}/**/*.parquet"))
        shards = [
            _Shard(
                PurePosixPath(path).name,
                int(system.info(path)["size"]),
                # Captions lie between the pictures of every row group: reading ahead, by default
                # 5 MB a time, would fetch most pictures for them.
                pyarrow.parquet.ParquetFile(
                    system.open(path, "rb", cache_type="none"), pre_buffer=True
                ),
            )
            for path in paths
        ]
    except Exception as error:  # the hub's, httpx's or requests', by its release
        raise DataError(
            f"The hub dataset {name} cannot be streamed: {_first_line(error)}{OFFLINE_WAYS}"
        ) from error
    return _table_of(shards, name)


def stream_folder(folder: Path) -> CaptionTable:
    """The parquet files below a folder, without the Arrow copy that `datasets` makes.

    Raises:
        DataError: A file cannot be read, or as `_table_of`.
    """
    shards = []
    for path in sorted(folder.rglob("*.parquet")):
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {_first_line(error)}") from error
        shards.append(_Shard(path.name, path.stat().st_size, file))
    return _table_of(shards, str(folder))


def _table_of(shards: list[_Shard], source: str) -> CaptionTable:
    """
    Raises:
        DataError: No files, other columns, or row groups too large for the memory.
    """
    if not shards:
        raise DataError(
            f"data.streaming reads parquet files and {source} has none; leave data.streaming out, "
            f"or give another data.source.{OFFLINE_WAYS}"
        )
    for shard in shards:
        refuse_without_pictures(shard.file.schema_arrow.names, source)
        _refuse_large_groups(shard, source)
    names = shards[0].file.schema_arrow.names
    wanted = text_columns(names)
    try:
        texts = pyarrow.concat_tables([shard.file.read(columns=wanted) for shard in shards])
    except Exception as error:  # as above
        raise DataError(f"The captions of {source} cannot be read: {_first_line(error)}") from error
    return table_of_columns(texts.to_pydict(), names, source, _StreamedPictures(shards, source))


def _refuse_large_groups(shard: _Shard, source: str) -> None:
    metadata = shard.file.metadata
    columns = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
    if _BYTES_COLUMN not in columns:
        raise DataError(
            f"{source}: the column 'image' of {shard.name} has no field 'bytes', so its pictures "
            "cannot be streamed; leave data.streaming out."
        )
    place = columns.index(_BYTES_COLUMN)
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    largest = max((group.column(place).total_uncompressed_size for group in groups), default=0)
    if largest > LARGEST_GROUP_BYTES:
        raise DataError(
            f"{source}: a row group of {shard.name} has {largest / 2**20:.0f} MB of pictures, and "
            f"streaming holds {_GROUPS_IN_MEMORY} groups in memory (at most "
            f"{LARGEST_GROUP_BYTES >> 20} MB each); leave data.streaming out, or write the file "
            "again: pyarrow.parquet.write_table(table, path, row_group_size=100)."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
