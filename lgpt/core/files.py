"""Files that are either whole or absent, and their digests. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lgpt.core.errors import CheckpointError

_CHUNK_BYTES = 1 << 18
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces that stay in the processor's cache."""
    digest = hashlib.sha256()
    piece = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while length := stream.readinto(piece):
            digest.update(piece[:length])
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex sha256 of a JSON value, independent of key order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse the few lines that a git clone without Git LFS leaves in place of weights.

    Raises:
        CheckpointError: It is such a pointer.
    """
    with path.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its "
                "clone, or download the file."
            )


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that renames inside it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomically(path: Path, payload: bytes) -> None:
    """Write beside the target, fsync, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with staged.open("wb") as stream:
        stream.write(payload)
        stream.flush()
        os.fsync(stream.fileno())
    staged.replace(path)
    sync_folder(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_bytes_atomically` for UTF-8 text."""
    write_bytes_atomically(path, text.encode())


def write_json_atomically(path: Path, value: Any) -> None:
    """`write_bytes_atomically` for a JSON value, indented, with a final newline."""
    write_text_atomically(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")
