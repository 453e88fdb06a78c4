"""The folder that conversion and export write: staged beside its place, then renamed there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lgpt.core.errors import CheckpointError
from lgpt.core.files import sync_folder

PROVENANCE = "export.json"


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into; at the end it stands at `out`, whole, or nothing has changed there.

    A kill between the two renames of a replacement leaves the earlier export beside `out`; the next
    start puts it back first.

    Args:
        out: New, empty, or (with `overwrite`) an earlier export. A link stays one, and what it
            points to is written.

    Raises:
        CheckpointError: `out` holds something else, or the disk does not take the files.
    """
    try:
        out = out.resolve()  # `.` has no name to stage beside
        _put_back(out)
        _refuse_foreign(out, overwrite)
    except (OSError, RuntimeError) as error:  # the latter for links in a circle
        raise CheckpointError(f"{out} cannot be written to ({error}).") from error
    staging = out.with_name(f".{out.name}.staging")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        _publish(staging, out)
    except OSError as error:
        raise CheckpointError(
            f"{out} was not written ({error}); nothing has changed there."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_full_disk(folder: Path, needed_bytes: int) -> None:
    """Raise CheckpointError, before anything heavy, where a folder's disk is too full."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"The weights need {needed_bytes:,} bytes, the disk of {folder.parent} has {free:,} "
            "free: make room, give another folder, or --dtype bf16."
        )


def _refuse_foreign(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / PROVENANCE).is_file():
        raise CheckpointError(
            f"{out} holds something that is no export of lgpt: give another folder."
        )
    if not overwrite:
        raise CheckpointError(
            f"{out} holds an earlier export: give another folder, or --overwrite to replace it."
        )


def _put_back(out: Path) -> None:
    if out.exists() or not (old := _replaced(out)).is_dir():
        return
    try:
        old.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"a killed conversion left the earlier export in {old}, and it cannot be put back to "
            f"{out} ({error}): move it by hand."
        ) from error


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _publish(staging: Path, out: Path) -> None:
    old = _replaced(out)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
