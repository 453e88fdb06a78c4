"""`lgpt prepare` that stands still at a place and waits to be killed.

python stopped_prepare.py CONFIG PLACE MARK: at PLACE it makes the file MARK, and nothing more.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from lgpt import cli
from lgpt.data import latent_cache_writer
from lgpt.data.latent_cache_writer import LatentCacheWriter

CONFIG, PLACE, MARK = sys.argv[1:]


def stand_still() -> None:
    Path(MARK).touch()
    time.sleep(600)


def second_chunk_half_written(path: Path, payload: bytes) -> None:
    if list(path.parent.glob("*.npz")):
        path.with_name(f".{path.name}.tmp").write_bytes(payload[: len(payload) // 2])
        stand_still()
    whole_write(path, payload)


def after_a_chunk(self: LatentCacheWriter, *chunk: Any, **arrays: Any) -> None:
    whole_chunk(self, *chunk, **arrays)
    stand_still()


def before_the_manifest(self: LatentCacheWriter, *facts: Any) -> None:
    stand_still()


whole_write, whole_chunk = latent_cache_writer.write_bytes_atomically, LatentCacheWriter.write_chunk
if PLACE == "second_chunk_half_written":
    latent_cache_writer.write_bytes_atomically = second_chunk_half_written
elif PLACE == "after_a_chunk":
    LatentCacheWriter.write_chunk = after_a_chunk
elif PLACE == "before_the_manifest":
    LatentCacheWriter._write_manifest = before_the_manifest
else:
    raise SystemExit(f"no such place: {PLACE}")

if __name__ == "__main__":
    sys.argv = ["lgpt", "prepare", CONFIG]
    cli.main()
