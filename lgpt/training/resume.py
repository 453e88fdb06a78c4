"""Going on from a checkpoint: whose numbers hold, told before and made true after loading."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lgpt.checkpoint.load import load_checkpoint
from lgpt.checkpoint.manifest import Manifest, read_manifest
from lgpt.checkpoint.resume_diff import (
    Choice,
    Row,
    facts_rows,
    settings_rows,
    settled,
    shape_rows,
    table_of,
    world_row,
)
from lgpt.core.distributed import is_rank_zero, world_size
from lgpt.core.errors import CheckpointError, LgptError, SettingsError
from lgpt.core.logging import get_logger
from lgpt.engine.average import WeightAverage
from lgpt.engine.build import hyperparameters, set_hyperparameters
from lgpt.engine.ranks import broadcast_from_rank_zero
from lgpt.settings.phases import Phase2, RunSettings
from lgpt.settings.run import load_run_settings
from lgpt.training.facts import code_version
from lgpt.training.task import TrainingTask

_log = get_logger(__name__)


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from, and what was decided about it.

    Attributes:
        folder: `checkpoints/step_<n>`.
        run: As the config says.
        saved: As the config of the save said.
        effective: The run that will train.
    """

    folder: Path
    manifest: Manifest
    run: RunSettings
    saved: RunSettings
    effective: RunSettings
    choice: Choice


def decide_resume(run: RunSettings, folder: Path) -> Resume:
    """Whose optimizer, schedule and batch hold, before anything heavy is done. All ranks call it.

    Raises:
        LgptError: The checkpoint is beyond training.max_steps, its config cannot be read, or
            `checkpoint.resume` is `ask` and there is nobody to ask.
    """
    answer: Any = None
    if is_rank_zero():
        try:
            answer = _decide(run, folder)
        except LgptError as error:
            answer = error
    answer = broadcast_from_rank_zero(answer)
    if isinstance(answer, LgptError):
        raise answer
    assert isinstance(answer, Resume)
    return answer


def load_resume(
    resume: Resume, task: TrainingTask, average: Optional[WeightAverage] = None
) -> dict[str, Any]:
    """Tell the resume diff, load, and make the effective column true. All ranks call it.

    With another number of ranks the global batch stays (accumulation follows, settings/deepspeed.py
    ), and so do the pictures of every step (places.py).

    DeepSpeed imposes what it saved (0.19.8: ZeRO-1 and 2 weight decay, betas and clipping, ZeRO-3
    the first two), so what the engines were built with is put back after loading.

    Args:
        average: Of the model's weights, where the run keeps one.

    Returns:
        The loop's own state of the save.

    Raises:
        CheckpointError: The checkpoint cannot be loaded; or `checkpoint` was chosen and the run
            reads other pictures, another VQ-VAE or another cache than it did, or has another model
            or loss.
    """
    engines = task.engines()
    built = {name: hyperparameters(engine) for name, engine in engines.items()}
    rows = _all_rows(resume, engines, built, task.content())
    _log.info(
        "Going on from %s with the numbers of the %s (checkpoint.resume):\n%s",
        resume.folder,
        resume.choice,
        table_of(rows),
    )
    _refuse_or_tell_other_content(resume, rows)
    averages = {} if average is None else {"model": average}
    state = load_checkpoint(engines, resume.folder, averages)
    for name, engine in engines.items():
        set_hyperparameters(engine, built[name])
        assert hyperparameters(engine) == built[name], f"{name} keeps the checkpoint's numbers"
    return state


def _decide(run: RunSettings, folder: Path) -> Resume:
    manifest = read_manifest(folder)
    if manifest.step > run.training.max_steps:
        raise SettingsError(
            f"The newest checkpoint of {run.name} is at step {manifest.step}, beyond "
            f"training.max_steps ({run.training.max_steps}); raise max_steps or give another name=."
        )
    try:
        saved = load_run_settings(folder / "config.yaml", environ={}, check_deepspeed=False)
    except SettingsError as error:
        raise CheckpointError(
            f"{folder / 'config.yaml'}, which the run was saved with, is not a run config of this "
            f"version ({error.problems[0]}): go on with the lgpt of the save "
            f"({manifest.versions.get('lgpt')}), or start a new run under another name=."
        ) from error
    if saved.phase != run.phase:
        raise SettingsError(
            f"{folder} was saved by phase {saved.phase}, this is phase {run.phase}: give another "
            "name=."
        )
    if isinstance(run, Phase2) and isinstance(saved, Phase2):
        now, then = run.finetuning.trains, saved.finetuning.trains
        if now != then:
            raise SettingsError(
                f"finetuning.trains is {now}, but {folder} was trained with {then}: set it back, "
                "or give another name= with init_from= that checkpoint."
            )
        _refuse_other_players(run, saved, folder)
    choice = _choice(run, saved, folder)
    return Resume(folder, manifest, run, saved, settled(run, saved, choice), choice)


def _refuse_other_players(run: Phase2, saved: Phase2, folder: Path) -> None:
    now, then = run.loss.adversarial, saved.loss.adversarial
    if now == then:
        return
    if then == "none":
        anew = "whose discriminator begins anew"
        text = f"loss.adversarial is {now}, but {folder} holds no discriminator"
    else:
        anew = "which leaves the discriminator behind"
        text = f"loss.adversarial is {now}, but {folder} was trained with {then}"
    raise SettingsError(
        f"{text}: set it back to {then}, or start a run under another name= with "
        f"init_from={folder}, {anew}."
    )


def _choice(run: RunSettings, saved: RunSettings, folder: Path) -> Choice:
    if run.checkpoint.resume != "ask":
        return run.checkpoint.resume
    imposed = settings_rows(run, saved, settled(run, saved, "checkpoint"))
    differing = [row for row in imposed if row.effective != row.config]
    if not differing:
        return "config"
    names = ", ".join(f"{row.name} {row.config} -> {row.checkpoint}" for row in differing)
    if not sys.stdin.isatty():
        raise SettingsError(
            f"checkpoint.resume is ask, there is no terminal to ask on, and the config differs "
            f"from {folder} ({names}): give checkpoint.resume=config or "
            "checkpoint.resume=checkpoint."
        )
    print(table_of(differing), file=sys.stderr, flush=True)
    while True:
        try:
            answer = input("Go on with the numbers of the config or of the checkpoint? ").strip()
        except EOFError:
            raise SettingsError(
                "checkpoint.resume is ask, and the terminal was closed without an answer: give "
                "checkpoint.resume=config or checkpoint.resume=checkpoint."
            ) from None
        if answer in ("config", "checkpoint"):
            return "config" if answer == "config" else "checkpoint"


def _all_rows(
    resume: Resume,
    engines: Mapping[str, Any],
    built: Mapping[str, Mapping[str, Any]],
    content: Mapping[str, Optional[str]],
) -> list[Row]:
    run, saved, effective, manifest = resume.run, resume.saved, resume.effective, resume.manifest
    rows = settings_rows(run, saved, effective)
    rows.append(world_row(run, saved, effective, world_size(), manifest.world_size))
    stages = {name: engine.zero_optimization_stage() for name, engine in engines.items()}
    saved_stages = {name: record.zero_stage for name, record in manifest.engines.items()}
    rows += shape_rows(stages, world_size(), saved_stages, manifest.world_size)
    rows += facts_rows(run, manifest.facts, built, content, code_version())
    return rows


def _refuse_or_tell_other_content(resume: Resume, rows: list[Row]) -> None:
    differing = [row for row in rows if row.differs]
    content = [row for row in differing if row.is_content and row.checkpoint is not None]
    model = [row for row in differing if row.is_model]
    if resume.choice == "checkpoint" and (content or model):
        raise CheckpointError(
            f"checkpoint.resume is checkpoint, but {resume.folder} was trained on something else: "
            f"{_was_and_is(content + model)}. Give it back what is in the config.yaml there, or "
            "set checkpoint.resume=config to go on with what there is now."
        )
    if content and is_rank_zero():
        _log.warning(
            "The next steps read something else than those before: %s. Pictures of this epoch may "
            "be seen twice or never.",
            _was_and_is(content),
        )
    if model and is_rank_zero():
        _log.warning(
            "The next steps train another model or loss than those before: %s.",
            _was_and_is(model),
        )


def _was_and_is(rows: list[Row]) -> str:
    return ", ".join(f"{row.name} (was {row.checkpoint}, is {row.config})" for row in rows)
