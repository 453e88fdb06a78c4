"""What `lgpt checkpoint` answers: a run's checkpoints, what each is worth, which one counts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from rich.table import Table

from lgpt.checkpoint.checks import record_check, recorded_check
from lgpt.checkpoint.folders import (
    is_of_a_run,
    problems_known_of,
    step_folders,
    step_of,
    verify,
    with_its_name,
)
from lgpt.checkpoint.manifest import FILE_NAME as MANIFEST
from lgpt.checkpoint.manifest import read_manifest
from lgpt.checkpoint.retention import Keep, Kept, reasons_to_stay, survey
from lgpt.checkpoint.retention import prune as prune_checkpoints
from lgpt.core.errors import CheckpointError

_LEFT_OVERS = {
    "staging": "a save that was interrupted; the next save removes it",
    "pruned": "a removal that was interrupted; the next save removes it",
    "replaced": "an older save of the same step; the next save removes it",
    "diverged": "set aside: its weights gave a loss that was not finite; no start uses it",
}


def list_checkpoints(run_folder: Path, keep: Keep) -> dict[str, Any]:
    """Every checkpoint of a run, newest first, and what else lies beside them.

    Raises:
        CheckpointError: The folder holds no checkpoints.
    """
    checkpoints = _checkpoints_of(run_folder)
    found = survey(checkpoints)
    stays = reasons_to_stay(found, keep)
    return {
        "run_folder": str(run_folder),
        "latest": _latest(checkpoints),
        "checkpoints": [_line(each, stays.get(each.step, [])) for each in found],
        "left_over": {
            path.name: _LEFT_OVERS[kind]
            for kind in _LEFT_OVERS
            for path in sorted(checkpoints.glob(f".{kind}_step_*"))
        },
    }


def verify_checkpoints(place: Path) -> dict[str, Any]:
    """Read every byte of one checkpoint, or of all of a run, and compare it with its digest.

    What was found is kept in the run's checks.json, where resuming and pruning look.
    """
    place = with_its_name(place)
    if (place / MANIFEST).is_file() or place.parent.name == "checkpoints":
        folders = [place]
    else:
        folders = step_folders(_checkpoints_of(place))
    results = []
    for folder in folders:
        started_at = time.monotonic()
        problems = verify(folder, deep=True)
        seconds = time.monotonic() - started_at
        if is_of_a_run(folder):
            record_check(folder, problems)
        size = _bytes_of(folder)
        results.append(
            {
                "checkpoint": str(folder),
                "is_whole": not problems,
                "problems": problems,
                "bytes": size,
                "seconds": round(seconds, 3),
                "mib_per_second": round(size / 2**20 / max(seconds, 1e-9), 1),
            }
        )
    return {"checkpoints": results}


def explain_choice(run_folder: Path, reads_all: bool) -> dict[str, Any]:
    """Which checkpoint the next start would go on from, and why each newer one would not.

    Args:
        reads_all: Compare every byte until one is whole, as a start does; otherwise only sizes and
            what earlier reads found.
    """
    checkpoints = _checkpoints_of(run_folder)
    passed_over, chosen = [], None
    for folder in step_folders(checkpoints):
        problems = problems_known_of(folder)
        if not problems and reads_all:
            problems = verify(folder, deep=True)
            record_check(folder, problems)
        if not problems:
            chosen = folder
            break
        passed_over.append({"checkpoint": folder.name, "problems": problems})
    facts: Mapping[str, Any] = {} if chosen is None else read_manifest(chosen).facts
    is_done = (checkpoints.parent / "DONE").exists()
    return {
        "run_folder": str(run_folder),
        "chosen": None if chosen is None else chosen.name,
        "place": facts.get("place"),
        "was_read": reads_all,
        "passed_over": passed_over,
        "latest": _latest(checkpoints),
        "is_done": is_done,
    }


def prune_run(run_folder: Path, keep: Keep, dry_run: bool) -> dict[str, Any]:
    """Remove what retention does not keep; with `dry_run` only say it."""
    checkpoints = _checkpoints_of(run_folder)
    found = survey(checkpoints)
    stays = reasons_to_stay(found, keep)
    going = [each.folder for each in found if each.step not in stays]
    freed = sum(_bytes_of(folder) for folder in going)
    if not dry_run:
        # A run that is training right now has its next one staged there.
        going = prune_checkpoints(checkpoints, keep, left_overs=("pruned",))
    return {
        "run_folder": str(run_folder),
        "keep": asdict(keep),
        "is_dry_run": dry_run,
        "removed": [folder.name for folder in going],
        "bytes": freed,
        "stays": {f"step_{step}": reasons for step, reasons in stays.items()},
    }


def checkpoints_table(listed: Mapping[str, Any]) -> Table:
    """`list_checkpoints` for people."""
    table = Table(title=listed["run_folder"], title_justify="left")
    for name in ("checkpoint", "saved", "ranks, engines", "size", "validation", "state", "stays"):
        table.add_column(name)
    for line in listed["checkpoints"]:
        table.add_row(
            line["name"] + (" (latest)" if line["name"] == listed["latest"] else ""),
            line["saved_at"] or "",
            line["saved_by"] or "",
            f"{line['bytes'] / 2**20:,.1f} MiB",
            "" if line["validation_loss"] is None else f"{line['validation_loss']:.4f}",
            _state_of(line),
            "; ".join(line["stays_because"]) or "no: the next save removes it",
        )
    for name, meaning in listed["left_over"].items():
        table.add_row(name, "", "", "", "", meaning, "")
    return table


def verified_table(verified: Mapping[str, Any]) -> Table:
    """`verify_checkpoints` for people."""
    table = Table("checkpoint", "result", "size", "read at")
    for each in verified["checkpoints"]:
        table.add_row(
            each["checkpoint"],
            "whole" if each["is_whole"] else "; ".join(each["problems"]),
            f"{each['bytes'] / 2**20:,.1f} MiB",
            f"{each['mib_per_second']:,.0f} MiB/s",
        )
    return table


def choice_text(choice: Mapping[str, Any]) -> str:
    """`explain_choice` for people."""
    how = "every byte read" if choice["was_read"] else "sizes and earlier reads only"
    lines = []
    if choice["is_done"]:
        lines.append(
            f"{choice['run_folder']} is done (DONE exists): a start trains nothing, unless it took "
            "all its steps and training.max_steps is raised."
        )
    if choice["chosen"] is None and choice["passed_over"]:
        lines.append(f"A start would refuse to begin anew: no checkpoint is whole ({how}).")
    elif choice["chosen"] is None and choice["is_done"]:
        lines.append("There is no checkpoint that it could go on from.")
    elif choice["chosen"] is None:
        lines.append("A start would begin at step 0: there is no checkpoint.")
    else:
        place = choice["place"]
        where = (
            ""
            if place is None
            else f", with image {place['next_image_of_epoch']} of {place['images_per_epoch']} in "
            f"epoch {place['epoch']}"
        )
        lines.append(f"A start would go on from {choice['chosen']} ({how}){where}.")
    for each in choice["passed_over"]:
        lines.append(f"Not from {each['checkpoint']}: {'; '.join(each['problems'][:3])}.")
    if choice["latest"] not in (None, choice["chosen"]):
        lines.append(f"The file `latest` says {choice['latest']}; a start does not ask it.")
    return "\n".join(lines)


def prune_text(pruned: Mapping[str, Any]) -> str:
    """`prune_run` for people."""
    stays = "\n".join(f"{name} stays: {'; '.join(why)}" for name, why in pruned["stays"].items())
    verb = "would be removed" if pruned["is_dry_run"] else "removed"
    names = ", ".join(pruned["removed"]) or "nothing"
    return f"{stays}\n{verb}: {names} ({pruned['bytes'] / 2**20:,.1f} MiB)"


def _checkpoints_of(run_folder: Path) -> Path:
    checkpoints = run_folder if run_folder.name == "checkpoints" else run_folder / "checkpoints"
    if not checkpoints.is_dir():
        raise CheckpointError(
            f"{run_folder} holds no checkpoints: give a run folder (runs/<name>), or for verify "
            "also one of its checkpoints/step_<n>."
        )
    return checkpoints


def _latest(checkpoints: Path) -> Optional[str]:
    try:
        return (checkpoints / "latest").read_text(errors="replace").strip()
    except OSError:
        return None


def _line(each: Kept, stays_because: list[str]) -> dict[str, Any]:
    line: dict[str, Any] = {
        "name": each.folder.name,
        "step": step_of(each.folder),
        "saved_at": None,
        "saved_by": None,
        "bytes": _bytes_of(each.folder),
        "validation_loss": each.validation_loss,
        "problems": list(each.problems),
        "read_at": None,
        "stays_because": stays_because,
    }
    check = recorded_check(each.folder)
    if check is not None:
        line["read_at"] = _clock(check.read_at)
    try:
        manifest = read_manifest(each.folder)
    except CheckpointError:
        return line
    engines = ", ".join(f"{name} {record}" for name, record in manifest.engines.items())
    line.update(
        saved_at=_clock(manifest.created_at), saved_by=f"{manifest.world_size} ranks, {engines}"
    )
    return line


def _state_of(line: Mapping[str, Any]) -> str:
    if line["problems"]:
        return "damaged: " + "; ".join(line["problems"][:2])
    return "sizes right" if line["read_at"] is None else f"whole, read {line['read_at']}"


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
