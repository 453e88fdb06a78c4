"""The checkpoints of a run folder: which there are, which are whole, which one is the newest."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Optional

from lgpt.checkpoint.checks import recorded_check
from lgpt.checkpoint.manifest import problems_of_files, read_manifest
from lgpt.core.errors import CheckpointError
from lgpt.core.files import write_text_atomically
from lgpt.core.logging import get_logger

_STEP_FOLDER = re.compile(r"step_(\d+)")

_log = get_logger(__name__)


def newest_checkpoint(run_folder: Path) -> Optional[Path]:
    """The newest checkpoint whose files are all there in full size; others are told and skipped.

    One that an earlier full read found damaged is skipped too.

    Call it on one rank and broadcast the answer: a network file system may show ranks different
    things.
    """
    for folder in step_folders(run_folder / "checkpoints"):
        problems = problems_known_of(folder)
        if not problems:
            return folder
        _log.warning("Checkpoint %s is skipped: %s", folder, "; ".join(problems[:3]))
    return None


def set_aside_after(run_folder: Path, step: int) -> list[Path]:
    """Rename checkpoints of later steps to `.diverged_step_<n>`; rank 0 only.

    They are kept for whoever wants to look into them, but no run goes on from them.

    Returns:
        The folders that were set aside, under their new names.
    """
    checkpoints, aside = run_folder / "checkpoints", []
    for folder in step_folders(checkpoints):
        if step_of(folder) > step:
            aside.append(folder.with_name(f".diverged_{folder.name}"))
            shutil.rmtree(aside[-1], ignore_errors=True)
            folder.rename(aside[-1])
    left = newest_checkpoint(run_folder)
    if left is not None:
        write_text_atomically(checkpoints / "latest", f"{left.name}\n")
    else:
        (checkpoints / "latest").unlink(missing_ok=True)
    return aside


def verify(folder: Path, deep: bool) -> list[str]:
    """What is wrong with a checkpoint folder; empty when it is whole.

    Args:
        deep: Also read every byte and compare digests, not only sizes.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    # A copy of a checkpoint may have any name; one in a run folder is found by its step.
    if _STEP_FOLDER.fullmatch(folder.name) and manifest.step != step_of(folder):
        return [f"its manifest is the one of step {manifest.step}"]
    return problems_of_files(folder, manifest.files, deep)


def with_its_name(folder: Path) -> Path:
    """The same folder by a path that ends in its name, which `.` and `..` do not."""
    return folder.resolve() if folder.name in ("", "..") else folder


def problems_known_of(folder: Path) -> list[str]:
    """What sizes and earlier full reads say against a checkpoint folder, without reading it all."""
    problems = verify(folder, deep=False)
    if problems:
        return problems
    check = recorded_check(folder)
    return [] if check is None else list(check.problems)


def is_of_a_run(folder: Path) -> bool:
    """Whether a checkpoint folder lies where a run looks for its own."""
    return folder.parent.name == "checkpoints" and _STEP_FOLDER.fullmatch(folder.name) is not None


def step_folders(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest step first."""
    found = [path for path in checkpoints.glob("step_*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    assert match is not None
    return int(match.group(1))
