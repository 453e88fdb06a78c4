"""`lgpt train`: from a run config to a finished run folder, on every rank."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional, Union

import torch

from lgpt.checkpoint.export import convert_run
from lgpt.checkpoint.load import find_whole_checkpoint
from lgpt.checkpoint.warm_start import load_first_weights, load_foreign_vqvae
from lgpt.core.distributed import barrier, is_rank_zero, rank, seed_everything, world_size
from lgpt.core.errors import CheckpointError, OutOfMemoryError, RankLostError, SettingsError
from lgpt.core.files import write_json_atomically, write_text_atomically
from lgpt.core.logging import get_logger
from lgpt.engine.average import WeightAverage
from lgpt.engine.build import set_masters
from lgpt.engine.ranks import broadcast_from_rank_zero, is_lost_rank
from lgpt.engine.start import afford_bf16, start_process_group
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.phases import Phase2, RunSettings, logged_parameters, run_tags
from lgpt.settings.run import run_folder_texts
from lgpt.tracking.run_tracker import RunTracker
from lgpt.training.launcher_watch import LauncherWatch
from lgpt.training.loop import run_training
from lgpt.training.resume import Resume, decide_resume, load_resume
from lgpt.training.run_lock import RunLock
from lgpt.training.run_progress import Progress
from lgpt.training.train_transformer import TransformerTask
from lgpt.training.train_vqvae import VqvaeTask
from lgpt.training.trial_batch import refuse_what_does_not_fit

_log = get_logger(__name__)
Task = Union[TransformerTask, VqvaeTask]


def train(run: RunSettings, ds_config: dict[str, Any]) -> None:
    """Train a run to its end, from its newest whole checkpoint where there is one.

    Args:
        run: The resolved run config.
        ds_config: The resolved DeepSpeed config (settings/deepspeed.py) for this number of ranks.

    Raises:
        LgptError: As the parts say; StoppedEarly (exit 75) after a signal, with a checkpoint saved.
    """
    device = start_process_group()
    if _is_done(run):
        return
    with RunLock(run.run_folder):
        _train_alone(run, ds_config, device)


def _train_alone(run: RunSettings, ds_config: dict[str, Any], device: torch.device) -> None:
    """No other process trains in the run folder."""
    if run.training.precision == "bf16":
        afford_bf16(device)
    newest = find_whole_checkpoint(run.run_folder)
    if newest is None:
        _refuse_to_begin_anew_over_a_result(run)
    resume = None if newest is None else decide_resume(run, newest)
    if resume is None:
        # First thing. A run that goes on keeps its files until nothing refuses the new start.
        _write_run_folder(run, ds_config)
    elif resume.effective != run:
        run = resume.effective
        ds_config = resolve_deepspeed_config(run, world_size())
    try:
        with LauncherWatch():
            _train_from(resume, run, ds_config, device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            "The device ran out of memory with batch.micro_batch_images "
            f"{run.batch.micro_batch_images}; lower it (the global batch stays: accumulation makes "
            "up for it); before the first step, a higher ZeRO stage or more GPUs help. "
            f"The device said: {str(error).splitlines()[0]}"
        ) from error
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        raise RankLostError(
            "Another rank has died, and training cannot go on without it: was it killed for its "
            "memory, or by a person? The same command goes on from the newest whole checkpoint in "
            f"{run.run_folder / 'checkpoints'}. This rank saw: {str(error).splitlines()[0]}"
        ) from error


def _train_from(
    resume: Optional[Resume], run: RunSettings, ds_config: dict[str, Any], device: torch.device
) -> None:
    """Build everything, load the checkpoint where there is one, and train to the end."""
    seed_everything(run.seed)  # the same weights on every rank
    task: Task = VqvaeTask(run, device) if isinstance(run, Phase2) else TransformerTask(run, device)
    if is_rank_zero():
        _log.info(
            "%s: phase %d trains the %s, %s parameters, on %d rank(s) of %s",
            run.name,
            run.phase,
            run.trains,
            f"{sum(p.numel() for p in task.model.parameters()):,}",
            world_size(),
            device.type,
        )
    first_weights = _load_first_weights(run, task) if resume is None else None
    task.build_engines(ds_config)
    if first_weights is not None:
        set_masters(task.engine, first_weights)
        del first_weights
    decay = run.training.ema_decay
    average = WeightAverage(task.engine, decay) if decay > 0 else None
    if isinstance(task, VqvaeTask):
        task.average = average  # restarted codes restart in it too
    if isinstance(task, VqvaeTask) and device.type == "cuda":
        refuse_what_does_not_fit(task.trial_batch, run.batch, device)
    seed_everything(run.seed, rank())
    progress = Progress() if resume is None else Progress(**load_resume(resume, task, average))
    if progress.task:
        task.load_state(progress.task)
    _write_run_folder(run, ds_config, task)
    if is_rank_zero():
        (run.run_folder / "DONE").unlink(missing_ok=True)  # more steps were asked for
    tracker = _start_tracking(run, task, progress) if is_rank_zero() else None
    try:
        run_training(run, task, tracker, progress, device, average)
        _finish(run, progress)
    except BaseException:
        if tracker is not None:
            tracker.finish("FAILED")
        raise


def _load_first_weights(run: RunSettings, task: Task) -> Optional[dict[str, torch.Tensor]]:
    """`init_from`, where it is set; what it took is told in the run folder."""
    if run.init_from is None:
        return None
    if isinstance(task, VqvaeTask) and task.run.finetuning.source != "custom":
        weights, report = load_foreign_vqvae(
            task.model, run.init_from, task.run.finetuning, task.description()
        )
    else:
        weights, report = load_first_weights(task.model, Path(run.init_from), task.description())
    if is_rank_zero():
        write_json_atomically(run.run_folder / "warm_start.json", asdict(report))
        if isinstance(task, VqvaeTask) and task.adversary is not None:
            _log.info("init_from holds the VQ-VAE's weights alone: the discriminator begins anew")
    return weights


def _is_done(run: RunSettings) -> bool:
    """Whether DONE is there; a run that took all its steps is not done when more are asked for."""
    done_file = run.run_folder / "DONE"
    done = broadcast_from_rank_zero(_read_done(done_file) if is_rank_zero() else None)
    if done is None:
        return False
    asked = run.training.max_steps
    took_all = "max_steps" in done and done.get("step") == done["max_steps"]
    if took_all and done["step"] < asked:
        _log.info(
            "%s was done after %d steps and goes on to training.max_steps = %d",
            run.name,
            done["step"],
            asked,
        )
        return False
    _log.info(
        "%s is done after %s steps (%s exists): nothing to train. Give another name= for a new "
        "run; one that took all its steps goes on with a larger training.max_steps (now %d).",
        run.name,
        done.get("step", "its"),
        done_file,
        asked,
    )
    return True


def _refuse_to_begin_anew_over_a_result(run: RunSettings) -> None:
    """A run that is asked for more steps, whose checkpoints were removed when it was done."""
    done_file = run.run_folder / "DONE"
    if broadcast_from_rank_zero(os.path.exists(done_file) if is_rank_zero() else None):
        raise CheckpointError(
            f"{run.name} is done ({done_file} exists) and has no checkpoint to go on from: bring "
            f"one back into {run.run_folder / 'checkpoints'}, or give another name= to begin at "
            "step 0 (init_from= takes weights of a model folder or another run)."
        )


def _read_done(path: Path) -> Optional[dict[str, Any]]:
    # Unlike Path.exists, it takes folders that cannot be read; writing there will say so.
    if not os.path.exists(path):
        return None
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it need not be ours: its being there is enough
        return {}
    return done if isinstance(done, dict) else {}


def _write_run_folder(
    run: RunSettings, ds_config: dict[str, Any], task: Optional[Task] = None
) -> None:
    """The resolved pair, what can be run again from there, and what the task knows of its model."""
    if not is_rank_zero():
        return
    try:
        for name, text in run_folder_texts(run).items():
            write_text_atomically(run.run_folder / name, text)
        write_json_atomically(run.run_folder / "ds_config.json", ds_config)
        if task is not None:
            write_json_atomically(run.run_folder / "model_config.json", task.description())
    except OSError as error:
        raise SettingsError(
            f"the run folder {run.run_folder} cannot be written ({error.strerror}: "
            f"{error.filename}); give another runs_folder=."
        ) from error


def _finish(run: RunSettings, progress: Progress) -> None:
    """DONE, and for phase 2 the model folder that phases 1 and 3 name."""
    if is_rank_zero():
        # Early stopping ends a run well after its best step.
        tag = "best" if run.training.early_stopping > 0 else None
        if isinstance(run, Phase2):
            model = run.run_folder / "model"
            convert_run(run.run_folder, model, dtype="fp32", overwrite=True, tag=tag)
        summary = {
            "step": progress.step,
            "max_steps": run.training.max_steps,
            "elapsed_seconds": round(progress.elapsed_seconds, 1),
            "validated_weights": "average" if run.training.ema_decay > 0 else "last",
            **progress.validation,
        }
        if tag is not None:
            summary["best_step"] = progress.best_validation_step
        write_json_atomically(run.run_folder / "DONE", summary)
        _log.info("Done: %s", summary)
    barrier()


def _start_tracking(run: RunSettings, task: Task, progress: Progress) -> RunTracker:
    tracker = RunTracker.start(
        run.run_folder,
        uri=run.tracking.uri,
        experiment=run.tracking.experiment or run.experiment,
        run_name=run.name,
        tags=run_tags(run),
        parameters={**logged_parameters(run), **task.parameters_to_log()},
        artifacts=[
            run.run_folder / name for name in ("config.yaml", "ds_config.json", "model_config.json")
        ],
        enabled=run.tracking.enabled,
    )
    tracker.truncate_after(progress.step)
    return tracker
