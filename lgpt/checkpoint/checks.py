"""checks.json: what the last full read of each checkpoint of a run found.

A bit that flips on the disk shows only when every byte is read. Who reads them all (a save, a
resume, `lgpt checkpoint verify`) leaves the answer here, so that nothing counts on a checkpoint
that is known to be damaged, and the newest one that was found whole is never removed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

from lgpt.checkpoint.manifest import FILE_NAME as MANIFEST
from lgpt.checkpoint.manifest import UNREADABLE
from lgpt.core.files import sha256_of_file, write_json_atomically
from lgpt.core.logging import get_logger

FILE_NAME = "checks.json"

_log = get_logger(__name__)


@dataclass(frozen=True)
class Check:
    """One full read.

    Attributes:
        read_at: Unix time, seconds.
        manifest_sha256: Of the manifest it was compared with; another one makes the check void.
        problems: What was wrong; empty when every byte is as it was saved.
    """

    read_at: float
    manifest_sha256: str
    problems: tuple[str, ...]


def recorded_check(folder: Path) -> Optional[Check]:
    """What the last full read of a checkpoint folder found; None when there was none."""
    check = _read(folder.parent).get(folder.name)
    return check if check is not None and check.manifest_sha256 == _digest(folder) else None


def record_check(folder: Path, problems: Sequence[str]) -> None:
    """Keep what a full read of a checkpoint found; one process at a time.

    A folder that cannot be written is no reason to fail: the next reader reads again. So it does
    where a file could not be read: a server that was away is no damage.
    """
    if any(UNREADABLE in problem for problem in problems):
        return
    checks = {
        name: check
        for name, check in _read(folder.parent).items()
        if (folder.parent / name).is_dir()
    }
    checks[folder.name] = Check(time.time(), _digest(folder), tuple(problems))
    try:
        write_json_atomically(
            folder.parent / FILE_NAME, {name: asdict(check) for name, check in checks.items()}
        )
    except OSError as error:
        _log.warning("What a read of %s found cannot be kept: %s", folder, error)


def _digest(folder: Path) -> str:
    try:
        return sha256_of_file(folder / MANIFEST)
    except OSError:
        return "none"


def _read(checkpoints: Path) -> dict[str, Check]:
    try:
        stored = json.loads((checkpoints / FILE_NAME).read_text())
        return {
            str(name): Check(
                float(each["read_at"]), str(each["manifest_sha256"]), tuple(each["problems"])
            )
            for name, each in stored.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # only a memory of earlier reads: without it they are read again
