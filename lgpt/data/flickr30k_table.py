"""What every way to Flickr30k ends in: a table of splits, captions and ids, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Union, runtime_checkable

from lgpt.core.errors import DataError

DEFAULT_SOURCE = "nlphuji/flickr30k"
PARQUET_REVISION = "refs/convert/parquet"
OFFLINE_WAYS = f"""
Flickr30k can be had without the hub in three ways; give any of these folders as data.source:
  - parquet files, downloaded elsewhere by
      hf download {DEFAULT_SOURCE} --repo-type dataset \\
        --revision {PARQUET_REVISION} --local-dir DIR
  - a dataset saved by `datasets.Dataset.save_to_disk(DIR)` with the columns
    image, caption, split and filename
  - the original results_20130124.token (or dataset_flickr30k.json, which also has the splits)
    beside the folder flickr30k-images."""

_CAPTION_COLUMNS = ("caption", "captions")
_ID_COLUMNS = ("filename", "img_id")


@runtime_checkable
class Pictures(Protocol):
    """The pictures of all rows."""

    def picture(self, row: int) -> Union[Path, bytes, None]:
        """A file, or a file's bytes; None where the row has none."""
        ...

    def contents(self) -> list[Union[int, str, None]]:
        """One value a row that changes when pictures do, for the fingerprint: sizes in bytes."""
        ...


@dataclass(frozen=True)
class CaptionTable:
    """All rows of a source, of every split, in the source's order.

    Attributes:
        splits: As the source spells them.
        captions: One text or several a row.
    """

    splits: list[str]
    captions: list[Any]
    ids: list[str]
    pictures: Pictures


def text_columns(names: Sequence[str]) -> list[str]:
    """Those of a source's columns that a table is made of, beside `image`."""
    return [name for name in names if name in (*_CAPTION_COLUMNS, "split", *_ID_COLUMNS)]


def table_of_columns(
    columns: dict[str, list[Any]], names: Sequence[str], source: str, pictures: Pictures
) -> CaptionTable:
    """A table out of the columns of a Flickr30k on the hub.

    Args:
        columns: Those that `text_columns` chose.
        names: All that the source has, for messages.

    Raises:
        DataError: `caption` or `split` is missing; names what is there.
    """
    caption = next((name for name in _CAPTION_COLUMNS if name in columns), None)
    missing = [] if caption else ["caption"]
    missing += [] if "split" in columns else ["split"]
    if caption is None or missing:
        raise DataError(
            f"{source} lacks the column(s) {', '.join(missing)}; its columns are "
            f"{list(names)}. For other pictures use data.dataset=folder."
        )
    id_column = next((name for name in _ID_COLUMNS if name in columns), None)
    rows = range(len(columns["split"]))
    ids = [str(columns[id_column][row]) if id_column else f"row {row}" for row in rows]
    return CaptionTable(columns["split"], columns[caption], ids, pictures)


def refuse_without_pictures(names: list[str], source: str) -> None:
    """
    Raises:
        DataError: There is no column `image`.
    """
    if "image" not in names:
        raise DataError(f"{source} has no column 'image'; its columns are {names}.")
