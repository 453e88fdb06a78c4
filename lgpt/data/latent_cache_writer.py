"""Writes a latent cache in chunks that survive a kill, and merges them.

While it is being built, `<folder>/parts/` holds `plan.json` and one file a finished chunk. A chunk
is a fixed range of pictures, or of different captions, encoded in batches that begin at its first
one; which rank does it decides nothing. So the merged files are the same, byte for byte, for every
number of ranks and after every kill. `manifest.json` is written last: without it there is no cache.

    tokens.bin             [pictures, crops, h * w] uint16; int32 for codebooks above 65,536 codes
    caption_offsets.npy    [pictures + 1]: picture i has the captions offsets[i] .. offsets[i + 1]
    caption_rows.npy       [captions]: which of the different captions each one is
    embedding_offsets.npy  [different captions + 1]: rows of embeddings.bin
    embeddings.bin         [words, width] float16 or bfloat16, cut at the end of the text
    images.jsonl           line i: id and captions of picture i, for people and reports
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Optional

import numpy as np

from lgpt.core.errors import DataError
from lgpt.core.files import sync_folder, write_bytes_atomically, write_json_atomically

MANIFEST = "manifest.json"
# Goes up with every change of files, chunk sizes or batches inside a chunk.
FORMAT = 2
IMAGES_PER_CHUNK = 256
CAPTIONS_PER_CHUNK = 1024

_PARTS = "parts"
_PLAN = "plan.json"
_TEXT_PARTS = ("text_encoder", "text_dtype")
_NO_TEXT = (None, "none")


@dataclass(frozen=True)
class CachePlan:
    """What is known before the first picture is encoded."""

    fingerprint: dict[str, Any]
    dataset: str
    split: str
    items: int
    crops: int
    grid: tuple[int, int]
    codebook_size: int
    downsample_factor: int
    different_captions: int
    text_dtype: Optional[str]

    @property
    def tokens_dtype(self) -> str:
        """The smallest type that holds every code."""
        return "uint16" if self.codebook_size <= 1 << 16 else "int32"

    @property
    def items_per_chunk(self) -> int:
        """Pictures of one chunk, with all their crops."""
        return max(1, IMAGES_PER_CHUNK // self.crops)


@dataclass(frozen=True)
class Chunk:
    """A range of pictures, or of different captions."""

    kind: str
    first: int
    stop: int


class LatentCacheWriter:
    """One rank's hand on a cache that is being built.

    Raises:
        DataError: The folder holds a cache, finished or not, that was made from something else.
    """

    def __init__(self, folder: Path, plan: CachePlan, rank: int, world: int) -> None:
        self.folder, self.plan, self._rank, self._world = folder, plan, rank, world
        self._parts = folder / _PARTS
        self.is_finished = (folder / MANIFEST).exists()
        for place in (folder / MANIFEST, self._parts / _PLAN):
            if place.exists():
                found = json.loads(place.read_text())
                refuse_other_fingerprint(
                    folder,
                    {**found["fingerprint"], "format": found["format"]},
                    {**plan.fingerprint, "format": FORMAT},
                )

    def begin(self, barrier: Callable[[], None]) -> list[Chunk]:
        """This rank's share of the chunks that are not there yet."""
        missing = [chunk for chunk in self._chunks() if not self._file(chunk).exists()]
        barrier()  # All ranks have looked before the first one writes.
        if self._rank == 0:
            plan = {"fingerprint": self.plan.fingerprint, "format": FORMAT}
            write_json_atomically(self._parts / _PLAN, plan)
        self._parts.mkdir(parents=True, exist_ok=True)
        return missing[self._rank :: self._world]

    def write_chunk(self, chunk: Chunk, **arrays: np.ndarray) -> None:
        """Keep a chunk's results; it is there whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_bytes_atomically(self._file(chunk), buffer.getvalue())

    def bad_images(self) -> list[tuple[int, str]]:
        """Item and reason of every picture that was skipped, over all chunks and ranks."""
        found: list[tuple[int, str]] = []
        for part in self._read("images"):
            found += zip(part["bad_items"].tolist(), part["bad_reasons"].tolist())
        return found

    def finish(self, image_ids: Sequence[str], captions: Sequence[tuple[str, ...]]) -> None:
        """Merge all chunks into the cache's files, then say that they are whole. Rank 0 only.

        Args:
            image_ids: One a picture of the dataset, bad ones included.
            captions: The same for captions.
        """
        assert self._rank == 0
        good = np.concatenate([part["items"] for part in self._read("images")])
        if len(good) == 0:
            raise DataError(
                f"{self.plan.dataset}/{self.plan.split}: not one picture can be read, so there is "
                "nothing to keep in the latent cache."
            )
        self._save("tokens.bin", (part["tokens"] for part in self._read("images")))
        row_of = {
            text: row
            for row, text in enumerate(dict.fromkeys(text for texts in captions for text in texts))
        }
        kept = [captions[item] for item in good]
        self._save_npy("caption_offsets.npy", _offsets([len(texts) for texts in kept]))
        rows = np.array([row_of[text] for texts in kept for text in texts], dtype=np.int64)
        self._save_npy("caption_rows.npy", rows)
        lines = (
            json.dumps({"id": image_ids[item], "captions": captions[item]}, ensure_ascii=False)
            + "\n"
            for item in good
        )
        self._save("images.jsonl", (line.encode() for line in lines))
        text_width = self._merge_text() if self.plan.text_dtype is not None else None
        self._write_manifest(len(good), text_width, [image_ids[i] for i, _ in self.bad_images()])

    def remove_parts(self) -> None:
        """The chunks are not needed once the manifest is there."""
        shutil.rmtree(self._parts, ignore_errors=True)

    def _merge_text(self) -> int:
        lengths = np.concatenate([part["lengths"] for part in self._read("captions")])
        self._save_npy("embedding_offsets.npy", _offsets(lengths))
        self._save("embeddings.bin", (part["embeddings"] for part in self._read("captions")))
        parts = self._read("captions")
        return int(next(parts)["embeddings"].shape[1])

    def _write_manifest(self, items: int, text_width: Optional[int], bad: list[str]) -> None:
        plan = self.plan
        cut = sum(int(part["cut"]) for part in self._read("captions"))
        names = ["tokens.bin", "caption_offsets.npy", "caption_rows.npy", "images.jsonl"]
        names += ["embedding_offsets.npy", "embeddings.bin"] if text_width is not None else []
        sync_folder(self.folder)
        manifest = {
            "format": FORMAT,
            "fingerprint": plan.fingerprint,
            "dataset": plan.dataset,
            "split": plan.split,
            "items": items,
            "crops": plan.crops,
            "grid": list(plan.grid),
            "codebook_size": plan.codebook_size,
            "downsample_factor": plan.downsample_factor,
            "tokens_dtype": plan.tokens_dtype,
            "text_width": text_width,
            "text_dtype": plan.text_dtype,
            "bad_images": bad,
            "different_captions": plan.different_captions,
            "cut_captions": cut,
            "files": {name: (self.folder / name).stat().st_size for name in names},
        }
        write_json_atomically(self.folder / MANIFEST, manifest)

    def _chunks(self) -> list[Chunk]:
        plan = self.plan
        captions = plan.different_captions if plan.text_dtype is not None else 0
        return [
            *_cut("images", plan.items, plan.items_per_chunk),
            *_cut("captions", captions, CAPTIONS_PER_CHUNK),
        ]

    def _file(self, chunk: Chunk) -> Path:
        return self._parts / f"{chunk.kind}_{chunk.first:09d}.npz"

    def _read(self, kind: str) -> Iterator[Any]:
        for chunk in self._chunks():
            if chunk.kind == kind:
                with np.load(self._file(chunk), allow_pickle=False) as part:
                    yield part

    def _save(self, name: str, pieces: Iterable[Any]) -> None:
        with (self.folder / name).open("wb") as stream:
            for piece in pieces:
                stream.write(piece if isinstance(piece, bytes) else piece.tobytes())
            _flush_to_disk(stream)

    def _save_npy(self, name: str, array: np.ndarray) -> None:
        with (self.folder / name).open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
            _flush_to_disk(stream)


def refuse_other_fingerprint(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise when a cache was made from something else than what is expected.

    Text embeddings that nobody asks for (`text_encoder` expected to be "none") do no harm.

    Raises:
        DataError: Names every part that differs, its old and new value, and the command.
    """
    old, new = _flat(found), _flat(expected)
    if new.get("text_encoder") in _NO_TEXT:
        old, new = ({k: v for k, v in d.items() if k not in _TEXT_PARTS} for d in (old, new))
    different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if not different:
        return
    lines = [f"  {key}: cache {old.get(key)!r}, run {new.get(key)!r}" for key in different]
    raise DataError(
        f"The latent cache {folder} was made from something else than this run wants:\n"
        + "\n".join(lines)
        + "\nGive latent_cache another folder, or remove this one and make it again:\n"
        f"  rm -r {folder} && lgpt prepare CONFIG"
    )


def _flat(parts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parts as `transform.resolution`, in the JSON types that come back from a file."""
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(parts, default=str)).items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _cut(kind: str, total: int, size: int) -> list[Chunk]:
    return [Chunk(kind, first, min(first + size, total)) for first in range(0, total, size)]


def _offsets(lengths: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


def _flush_to_disk(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
