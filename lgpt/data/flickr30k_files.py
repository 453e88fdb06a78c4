"""Flickr30k as its authors give it: a file of captions beside a folder of pictures.

    results_20130124.token       1000092795.jpg#0 <tab> Two young guys with shaggy hair ...
    dataset_flickr30k.json       Karpathy's, with the splits that papers use; taken when it is there
    flickr30k-images/            1000092795.jpg ...

The .token file knows no splits. Without dataset_flickr30k.json they follow from a hash of the file
name, in the published proportions (1,014 and 1,000 of 31,014 for val and test), and a warning says
that they are not the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

from lgpt.core.errors import DataError
from lgpt.core.logging import get_logger
from lgpt.data.flickr30k_table import CaptionTable
from lgpt.data.splits import hashed_split

_log = get_logger(__name__)

SPLITS_FILE = "dataset_flickr30k.json"
_VAL_FRACTION, _TEST_FRACTION = 1014 / 31014, 1000 / 31014
_PROBLEMS_SHOWN = 10
_NAMES_TRIED = 100


class _FilePictures:
    """Pictures in a folder, by file name."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder, self._names = folder, names

    def picture(self, row: int) -> Union[Path, bytes, None]:
        return self._folder / self._names[row]

    def contents(self) -> list[Union[int, str, None]]:
        files = (self._folder / name for name in self._names)
        return [file.stat().st_size if file.exists() else None for file in files]


def is_original_layout(folder: Path) -> bool:
    """Whether there is a caption file of the original distribution."""
    return (folder / SPLITS_FILE).is_file() or _token_file(folder) is not None


def open_original(folder: Path) -> CaptionTable:
    """Captions of dataset_flickr30k.json, else of the .token file; pictures are looked up by name.

    Raises:
        DataError: Lines that cannot be used, or no folder with these pictures.
    """
    split_file, token_file = folder / SPLITS_FILE, _token_file(folder)
    if split_file.is_file():
        splits, captions = _read_karpathy(split_file)
    else:
        assert token_file is not None, "is_original_layout was asked first"
        captions = _read_tokens(token_file)
        splits = {name: hashed_split(name, _VAL_FRACTION, _TEST_FRACTION) for name in captions}
        _log.warning(
            "%s tells no splits and there is no %s beside it: they follow from a hash of each file "
            "name, so they are not the published ones and scores cannot be compared with papers.",
            token_file,
            SPLITS_FILE,
        )
    names = list(captions)
    pictures = _FilePictures(_picture_folder(folder, names), names)
    texts: list[Any] = list(captions.values())
    return CaptionTable([splits[name] for name in names], texts, names, pictures)


def _token_file(folder: Path) -> Optional[Path]:
    return next(iter(sorted(folder.glob("*.token"))), None)


def _read_tokens(path: Path) -> dict[str, list[str]]:
    """File name to captions, in the order of the file."""
    captions: dict[str, list[str]] = {}
    problems: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        place, tab, text = line.partition("\t")
        name, mark, _ = place.rpartition("#")
        if not (tab and mark and name and text.strip()):
            problems.append(f"{path}:{number}: not NAME.jpg#NUMBER<tab>caption: {line[:60]}")
            continue
        captions.setdefault(name, []).append(text)
    if not captions and not problems:
        problems.append(f"{path}: it is empty")
    if problems:
        raise DataError(
            f"{len(problems)} line(s) cannot be used:\n  " + "\n  ".join(problems[:_PROBLEMS_SHOWN])
        )
    return captions


def _read_karpathy(path: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """File name to split, and to captions, in the order of the file."""
    try:
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        splits = {image["filename"]: str(image["split"]) for image in images}
        captions = {
            image["filename"]: [sentence["raw"] for sentence in image["sentences"]]
            for image in images
        }
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not Karpathy's {SPLITS_FILE} ({type(error).__name__}: {error}); it has "
            "images with filename, split and sentences. Remove it to go by the .token file."
        ) from error
    return splits, captions


def _picture_folder(root: Path, names: list[str]) -> Path:
    """The folder, up to two levels below, that holds the first pictures."""
    for folder in _folders_below(root):
        if any((folder / name).is_file() for name in names[:_NAMES_TRIED]):
            return folder
    raise DataError(
        f"{root} has captions, but neither it nor a folder in it (flickr30k-images) holds the "
        f"pictures, such as {names[0]}; put the picture folder beside the caption file."
    )


def _folders_below(root: Path) -> Iterator[Path]:
    yield root
    level = sorted(path for path in root.iterdir() if path.is_dir())
    yield from level
    for folder in level:
        yield from sorted(path for path in folder.iterdir() if path.is_dir())
