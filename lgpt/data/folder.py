"""Your own pictures: a folder with a captions.jsonl, or a Hugging Face imagefolder.

    my-pictures/captions.jsonl      {"file_name": "a/1.jpg", "caption": "a red apple"}
                                    {"image": "2.png", "captions": ["a cat", "a tabby cat"]}
                                    {"file_name": "3.png", "caption": "a dog", "split": "val"}

An imagefolder has metadata.jsonl or metadata.csv instead, in the folder itself or one in each of
its split folders (train/, validation/, test/). The captions' key may be caption, captions or text.
Paths are relative to the file that names them. Where nothing tells the splits, 2% of the pictures,
chosen by a hash of their path, are for validation; so adding pictures does not move the others.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from PIL import Image

from lgpt.core.errors import DataError
from lgpt.data.captioned import decode_image
from lgpt.data.splits import SPLIT_NAMES, hashed_split
from lgpt.settings.data import DataSettings

VALIDATION_FRACTION = 0.02
_METADATA = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
_FILE_KEYS = ("file_name", "image")
_CAPTION_KEYS = ("captions", "caption", "text")
_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class _Picture:
    path: Path
    image_id: str
    captions: tuple[str, ...]
    split: Optional[str]


class FolderDataset:
    """One split of a folder of pictures with captions."""

    name = "folder"

    def __init__(self, split: str, settings: DataSettings) -> None:
        """
        Raises:
            DataError: No folder, no captions, lines that cannot be used, or an empty split.
        """
        self.split = split
        root = _root_of(settings.source)
        pictures = _read_pictures(root)
        is_told = any(picture.split is not None for picture in pictures)
        # With some splits told, the pictures without one are for training.
        splits = [
            picture.split or "train"
            if is_told
            else hashed_split(picture.image_id, VALIDATION_FRACTION)
            for picture in pictures
        ]
        self._pictures = [p for p, found in zip(pictures, splits) if found == split]
        if not self._pictures:
            raise DataError(
                f"{root} has no pictures in split '{split}', only {dict(Counter(splits))}; "
                f'give some lines "split": "{split}".'
            )
        self.fingerprint = self._digest()

    def __len__(self) -> int:
        return len(self._pictures)

    def image_id(self, index: int) -> str:
        """Path relative to the folder."""
        return self._pictures[index].image_id

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions in the order of the file."""
        return self._pictures[index].captions

    def load(self, index: int) -> Image.Image:
        """The picture, RGB, upright."""
        picture = self._pictures[index]
        return decode_image(picture.path, picture.image_id)

    def _digest(self) -> str:
        """Of ids, captions and file sizes: reading all pictures here would take minutes."""
        digest = hashlib.sha256()
        for picture in self._pictures:
            size = picture.path.stat().st_size if picture.path.exists() else -1
            digest.update(json.dumps([picture.image_id, picture.captions, size]).encode())
        return digest.hexdigest()


def _root_of(source: Optional[str]) -> Path:
    if source is None:
        raise DataError(
            "data.dataset is 'folder' and data.source is not set; point it at your pictures: "
            "data.source=my-pictures"
        )
    if not Path(source).is_dir():
        raise DataError(f"data.source {source} is not a folder.")
    return Path(source)


def _read_pictures(root: Path) -> list[_Picture]:
    pictures: list[_Picture] = []
    problems: list[str] = []
    for metadata, split in _metadata_files(root):
        for place, row in _rows(metadata, problems):
            try:
                pictures.append(_picture(row, metadata.parent, root, split))
            except ValueError as error:
                problems.append(f"{place}: {error}")
    if problems:
        shown = [f"  {problem}" for problem in problems[:_PROBLEMS_SHOWN]]
        if len(problems) > _PROBLEMS_SHOWN:
            shown.append(f"  and {len(problems) - _PROBLEMS_SHOWN} more")
        raise DataError(f"{len(problems)} lines cannot be used:\n" + "\n".join(shown))
    return sorted(pictures, key=lambda picture: picture.image_id)


def _metadata_files(root: Path) -> list[tuple[Path, Optional[str]]]:
    """Files that name pictures, each with the split its folder stands for."""
    places: list[tuple[Path, Optional[str]]] = [(root, None)]
    places += [(p, SPLIT_NAMES[p.name]) for p in sorted(root.iterdir()) if p.name in SPLIT_NAMES]
    found = []
    for folder, split in places:
        files = [folder / name for name in _METADATA if (folder / name).is_file()]
        if len(files) > 1:
            raise DataError(
                f"{folder} has {' and '.join(file.name for file in files)}; keep only one of them."
            )
        found += [(file, split) for file in files]
    if not found:
        raise DataError(
            f"{root} has no captions.jsonl (and no imagefolder metadata.jsonl or metadata.csv). "
            'Write one line a picture: {"file_name": "1.jpg", "caption": "a red apple"}'
        )
    return found


def _rows(metadata: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line as keys and values, with its place for messages."""
    text = metadata.read_text(encoding="utf-8-sig")
    if metadata.suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True))
        for row in reader:
            yield f"{metadata}:{reader.line_num}", {k: v for k, v in row.items() if v}
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{metadata}:{number}: not JSON: {error}")
            continue
        if isinstance(row, dict):
            yield f"{metadata}:{number}", row
        else:
            problems.append(f"{metadata}:{number}: not an object of keys and values: {line[:60]}")


def _picture(row: dict[str, Any], folder: Path, root: Path, split: Optional[str]) -> _Picture:
    """
    Raises:
        ValueError: The line says too little; with what it lacks.
    """
    file_name = next((row[key] for key in _FILE_KEYS if isinstance(row.get(key), str)), None)
    if file_name is None:
        raise ValueError(f"no {' or '.join(_FILE_KEYS)}; its keys are {sorted(row)}")
    captions = next((row[key] for key in _CAPTION_KEYS if row.get(key)), None)
    texts = [captions] if isinstance(captions, str) else captions
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"no {', '.join(_CAPTION_KEYS)}; its keys are {sorted(row)}")
    told = row.get("split", split)
    if told is not None and told not in SPLIT_NAMES:
        raise ValueError(f"split {told!r} is none of {sorted(SPLIT_NAMES)}")
    path = folder / file_name
    inside = path.relative_to(root) if path.is_relative_to(root) else path
    return _Picture(path, inside.as_posix(), tuple(texts), SPLIT_NAMES[told] if told else None)
