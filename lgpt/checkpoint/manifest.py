"""manifest.json: what a checkpoint folder holds. Written last, so a folder with one is complete."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lgpt.core.errors import CheckpointError
from lgpt.core.files import sha256_of_file, write_json_atomically

FILE_NAME = "manifest.json"
UNREADABLE = "cannot be read"
"""In a problem that the disk had with reading: the bytes themselves may be right."""
_FORMAT = 2
_READERS = min(8, os.cpu_count() or 1)
_READABLE = (1, _FORMAT)  # 1 had no facts


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
        facts: What else decided its steps: place in the sample order, the optimizer's numbers,
            digests of data, VQ-VAE and latent cache, source commit, MLflow run; and the validation
            loss of these weights where it was measured.
    """

    step: int
    world_size: int
    engines: dict[str, EngineRecord]
    files: dict[str, FileRecord]
    versions: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
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
        if stored["format"] not in _READABLE:
            raise CheckpointError(
                f"{path} has format {stored['format']}, this version reads up to {_FORMAT}: "
                "use the version of lgpt that wrote it, see 'versions' there."
            )
        _refuse_other_types(stored)
        stored["files"] = {name: FileRecord(**record) for name, record in stored["files"].items()}
        stored["engines"] = {name: EngineRecord(**each) for name, each in stored["engines"].items()}
        return Manifest(**stored)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} has no {FILE_NAME}: saving it was never completed."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} {UNREADABLE} ({error.strerror}).") from error


def _refuse_other_types(stored: Mapping[str, Any]) -> None:
    """Raise TypeError for what was edited by hand and would fail where it is looked at."""
    kinds: dict[str, Any] = {"step": int, "world_size": int, "versions": dict, "facts": dict}
    kinds["created_at"] = (int, float)
    for name, kind in kinds.items():
        if name in stored and not isinstance(stored[name], kind):
            raise TypeError(f"{name} is {stored[name]!r}")
    if (measured := stored.get("facts", {}).get("validation")) is not None:
        float(measured["loss"])


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
    """What is wrong with the recorded files: missing, another size, and (deep) another digest.

    Several files are read at once, large ones first: one hash keeps one core busy, not a disk.
    """
    problems = {}
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            problems[name] = "is missing"
        elif path.stat().st_size != record.bytes:
            problems[name] = f"has {path.stat().st_size} bytes instead of {record.bytes}"
    if deep:
        rest = sorted(set(files) - set(problems), key=lambda name: -files[name].bytes)
        with ThreadPoolExecutor(_READERS, "lgpt-verify") as readers:
            digests = readers.map(lambda name: _digest_or_problem(folder / name), rest)
            for name, (digest, problem) in zip(rest, digests):
                if problem or digest != files[name].sha256:
                    changed = "has other content than was saved (sha256 differs)"
                    problems[name] = problem or changed
    return [f"{name} {problems[name]}" for name in files if name in problems]


def _digest_or_problem(path: Path) -> tuple[str, str]:
    try:
        return sha256_of_file(path), ""
    except OSError as error:
        return "", f"{UNREADABLE} ({error.strerror})"
