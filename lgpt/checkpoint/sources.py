"""Which checkpoint is meant by a run folder, a step, a tag, or a folder of DeepSpeed's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lgpt.checkpoint.deepspeed_files import files_by_rank
from lgpt.checkpoint.folders import newest_checkpoint, with_its_name
from lgpt.checkpoint.manifest import FILE_NAME as MANIFEST
from lgpt.checkpoint.retention import survey
from lgpt.core.errors import CheckpointError

_MODEL = "model"  # the engine that is converted, where a checkpoint holds several


@dataclass(frozen=True)
class CheckpointPlace:
    """One checkpoint.

    Attributes:
        engine_folder: DeepSpeed's files.
        step_folder: The folder of lgpt around it, with config and manifest; None where DeepSpeed
            alone saved.
    """

    engine_folder: Path
    step_folder: Optional[Path]

    @property
    def name(self) -> str:
        """What it is called in cards and messages."""
        return (self.step_folder or self.engine_folder).name


def find_checkpoint(source: Path, tag: Optional[str] = None) -> CheckpointPlace:
    """The checkpoint that is named; a run's newest whole one where only the run is.

    Args:
        source: A run folder, its `checkpoints`, a `step_<n>` in it, or a folder that DeepSpeed
            saved alone, with or without its tag.
        tag: Which one in that folder: a step (`500`, `step_500`), `latest`, `best` (the lowest
            validation loss), or DeepSpeed's tag.

    Raises:
        CheckpointError: There is none such; it lists those that are there.
    """
    source = with_its_name(source)
    if tag is not None:
        return _tagged(source, tag)
    if (source / MANIFEST).is_file():
        return CheckpointPlace(source / _MODEL, source)
    if files_by_rank(source, "optim"):
        step_folder = source.parent if (source.parent / MANIFEST).is_file() else None
        return CheckpointPlace(source, step_folder)
    run_folder = source.parent if source.name == "checkpoints" else source
    if (newest := newest_checkpoint(run_folder)) is not None:
        return CheckpointPlace(newest / _MODEL, newest)
    if (latest := _tag_in_latest(source)) is not None:
        return _tagged(source, latest)
    raise CheckpointError(
        f"{source} holds no whole checkpoint: give a run folder (runs/<name>), a step folder "
        "(runs/<name>/checkpoints/step_<n>) or a folder that DeepSpeed saved ZeRO shards to."
    )


def _tagged(source: Path, tag: str) -> CheckpointPlace:
    if tag == "latest" and not (source / tag).is_dir():
        return find_checkpoint(source)
    if tag == "best" and not (source / tag).is_dir():
        return _best(source)
    names = [tag, f"step_{tag}"] if re.fullmatch(r"\d+", tag) else [tag]
    for folder in (source, source / "checkpoints"):
        for name in names:
            if (folder / name).is_dir():
                return find_checkpoint(folder / name)
    there = sorted(
        path.name
        for folder in (source, source / "checkpoints")
        for path in folder.glob("*")
        if (path / MANIFEST).is_file() or files_by_rank(path, "optim")
    )
    raise CheckpointError(
        f"{source} holds no checkpoint '{tag}'; there are {', '.join(there) or 'none'}."
    )


def _best(source: Path) -> CheckpointPlace:
    """The whole checkpoint with the lowest validation loss; the newest of equals."""
    checkpoints = source if source.name == "checkpoints" else source / "checkpoints"
    measured = [
        each
        for each in survey(checkpoints)
        if not each.problems and each.validation_loss is not None
    ]
    if not measured:
        raise CheckpointError(
            f"{source} holds no checkpoint that was saved right after a validation, so none is the "
            "best: give a step instead, or let training.validate_every be a multiple of "
            "checkpoint.every_steps."
        )
    best = min(measured, key=lambda each: (each.validation_loss, -each.step))
    return find_checkpoint(best.folder)


def _tag_in_latest(folder: Path) -> Optional[str]:
    """The tag that DeepSpeed's `latest` names; None without one."""
    path = folder / "latest"
    tag = path.read_text(errors="replace").strip() if path.is_file() else ""
    return tag if tag and (folder / tag).is_dir() and Path(tag).name == tag else None
