"""manifest.json: what a checkpoint folder holds. Written last, so a folder with one is complete."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lgpt.core.errors import CheckpointError
from lgpt.core.files import sha256_of_file, write_json_atomically

FILE_NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """A file's size and hex sha256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class EngineRecord:
    """What decides the names and the cutting of an engine's files."""

    zero_stage: int
    precision: str

    def __str__(self) -> str:
        return f"ZeRO-{self.zero_stage} in {self.precision}"


@dataclass(frozen=True)
class Manifest:
    """The contents of one `step_<n>` folder.

    Attributes:
        step: Optimizer steps done.
        world_size: Ranks that saved it.
        engines: ZeRO stage and precision of each engine, by its name, which is also its folder.
        files: Every file but the manifest, by its path inside the folder.
        versions: Of lgpt, torch and deepspeed, for the reader of an old checkpoint.
    """

    step: int
    world_size: int
    engines: dict[str, EngineRecord]
    files: dict[str, FileRecord]
    versions: dict[str, str]
    created_at: float = field(default_factory=time.time)
    format: int = _FORMAT

    def write(self, folder: Path) -> None:
        """Write it, atomically and synced."""
        write_json_atomically(folder / FILE_NAME, asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: It is missing, damaged, or of a newer format.
    """
    path = folder / FILE_NAME
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {stored['format']}, this version reads {_FORMAT}: "
                "use the version of lgpt that wrote it, see 'versions' there."
            )
        stored["files"] = {name: FileRecord(**record) for name, record in stored["files"].items()}
        stored["engines"] = {name: EngineRecord(**each) for name, each in stored["engines"].items()}
        return Manifest(**stored)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {FILE_NAME}: saving it was never completed."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def record_files(folder: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Push the named files to the disk (fsync) and take their size and digest."""
    records = {}
    for name in names:
        path = folder / name
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        records[name] = FileRecord(path.stat().st_size, sha256_of_file(path))
    return records


def list_files(folder: Path) -> list[str]:
    """Every file below a folder but the manifest, as sorted relative paths with `/`."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != FILE_NAME
    )


def problems_of_files(folder: Path, files: Mapping[str, FileRecord], deep: bool) -> list[str]:
    """What is wrong with the recorded files: missing, another size, and (deep) another digest."""
    problems = []
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != record.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {record.bytes}")
        elif deep and sha256_of_file(path) != record.sha256:
            problems.append(f"{name} has other content than was saved (sha256 differs)")
    return problems
