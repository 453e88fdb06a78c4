"""Which checkpoints stay, and how the others go without ever leaving half a one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lgpt.checkpoint.checks import recorded_check
from lgpt.checkpoint.folders import problems_known_of, step_folders, step_of
from lgpt.checkpoint.manifest import read_manifest
from lgpt.core.errors import CheckpointError
from lgpt.core.logging import get_logger

_LEFT_OVERS = ("staging", "pruned", "replaced")

_log = get_logger(__name__)


@dataclass(frozen=True)
class Keep:
    """What stays.

    Attributes:
        last: The newest whole ones; at least 2, because the newest may be the damaged one.
        every_steps: And those of every step that this divides; 0 = off.
        best: And so many with the lowest validation loss, among those saved right after one.
    """

    last: int
    every_steps: int = 0
    best: int = 0


@dataclass(frozen=True)
class Kept:
    """One checkpoint as retention sees it.

    Attributes:
        folder: `checkpoints/step_<n>`.
        problems: What is known to be wrong with it; empty when it counts as whole.
        was_read: Every byte was once compared with its digest, and was right.
        validation_loss: Measured on its weights; None when it was not.
    """

    folder: Path
    problems: tuple[str, ...] = ()
    was_read: bool = False
    validation_loss: Optional[float] = None

    @property
    def step(self) -> int:
        return step_of(self.folder)


def survey(checkpoints: Path) -> list[Kept]:
    """All checkpoints of a run, newest first, judged without reading their content."""
    return [_judged(folder) for folder in step_folders(checkpoints)]


def reasons_to_stay(found: Sequence[Kept], keep: Keep) -> dict[int, list[str]]:
    """Why each step's checkpoint stays; steps that are missing may go.

    Nothing goes before `keep.last` whole ones are there; then all older ones without a reason go,
    damaged ones too.

    Args:
        found: Newest first.
    """
    whole = [each for each in found if not each.problems]
    reasons: dict[int, list[str]] = {}

    def stays(chosen: Sequence[Kept], why: str) -> None:
        for each in chosen:
            reasons.setdefault(each.step, []).append(why)

    stays(whole[: keep.last], f"one of the last {keep.last}")
    if len(whole) < keep.last:
        stays([each for each in found if each.problems], "damaged, and no older than the last ones")
        return reasons
    oldest_of_the_last = whole[keep.last - 1].step
    newer = [each for each in found if each.problems and each.step > oldest_of_the_last]
    stays(newer, "damaged, but newer than a whole one")
    # The newest whose every byte was seen to be right: all newer ones may yet turn out damaged.
    stays([each for each in whole if each.was_read][:1], "the last verified one")
    measured = [each for each in whole if each.validation_loss is not None]
    measured.sort(key=lambda each: (each.validation_loss, -each.step))
    stays(measured[: keep.best], f"one of the best {keep.best}")
    if keep.every_steps:
        every = [each for each in whole if each.step % keep.every_steps == 0]
        stays(every, f"a multiple of {keep.every_steps}")
    return reasons


def prune(checkpoints: Path, keep: Keep, left_overs: Sequence[str] = _LEFT_OVERS) -> list[Path]:
    """Remove what has no reason to stay, and what interrupted saves left; on one rank only.

    Args:
        left_overs: Which kinds of left-overs go too.

    Returns:
        The checkpoint folders that were removed.
    """
    found = survey(checkpoints)
    reasons = reasons_to_stay(found, keep)
    problems, removed = [], []
    for each in found:
        if each.step in reasons:
            continue
        # Renamed first: a kill in the middle must not leave half a checkpoint under its name.
        try:
            each.folder.rename(each.folder.with_name(f".pruned_{each.folder.name}"))
            removed.append(each.folder)
        except OSError as error:
            problems.append(str(error))
    problems += sweep(checkpoints, left_overs)
    if problems:
        _log.warning("Old checkpoints could not be removed: %s", "; ".join(problems))
    return removed


def sweep(checkpoints: Path, left_overs: Sequence[str] = _LEFT_OVERS) -> list[str]:
    """Remove what an interrupted save or removal left; returns what could not be removed.

    A file that a reader holds open makes a folder on NFS resist, and the next save must not fail
    for it.
    """
    put_back_replaced(checkpoints)
    problems = []
    for kind in left_overs:
        for folder in checkpoints.glob(f".{kind}_step_*"):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                problems.append(str(error))
    if "staging" in left_overs:
        for half_written in checkpoints.glob(".*.tmp"):  # core/files.py, killed before its rename
            try:
                half_written.unlink()
            except OSError as error:
                problems.append(str(error))
    return problems


def put_back_replaced(checkpoints: Path) -> None:
    """After a kill between the two renames of a replacement the old one is the only one."""
    for folder in checkpoints.glob(".replaced_step_*"):
        final = folder.with_name(folder.name[len(".replaced_") :])
        if not final.exists():
            try:
                folder.rename(final)
            except OSError as error:
                _log.warning("%s cannot be put back to %s: %s", folder, final, error)


def _judged(folder: Path) -> Kept:
    problems = tuple(problems_known_of(folder))
    if problems:
        return Kept(folder, problems)
    check = recorded_check(folder)
    try:
        measured = read_manifest(folder).facts.get("validation")
    except CheckpointError as error:  # removed a moment ago
        return Kept(folder, (str(error),))
    loss = None if measured is None else float(measured["loss"])
    if loss is not None and not math.isfinite(loss):
        loss = None  # weights without a loss are nobody's best; NaN would sort anywhere
    return Kept(folder, was_read=check is not None, validation_loss=loss)
