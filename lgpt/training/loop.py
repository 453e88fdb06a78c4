"""The loop of every phase: cadence, budget, signals, and the stop at a loss that is not finite."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn, Optional

import torch
from tqdm import tqdm

from lgpt.checkpoint.folders import newest_checkpoint, set_aside_after
from lgpt.core.distributed import barrier, is_rank_zero
from lgpt.core.errors import DivergedError, StoppedEarly
from lgpt.core.logging import get_logger
from lgpt.engine.average import WeightAverage, averaged_weights
from lgpt.engine.build import gradient_norm, set_learning_rate
from lgpt.engine.memory import peak_bytes
from lgpt.engine.ranks import broadcast_from_rank_zero, max_over_ranks, mean_over_ranks
from lgpt.settings.phases import RunSettings
from lgpt.tracking.run_tracker import RunTracker
from lgpt.training.run_progress import Progress
from lgpt.training.saving import Saver
from lgpt.training.schedule import learning_rate_at
from lgpt.training.stop_signals import StopSignals
from lgpt.training.task import TrainingTask

_MOST_SKIPPED_STEPS = 10  # in a row

_log = get_logger(__name__)


def run_training(
    run: RunSettings,
    task: TrainingTask,
    tracker: Optional[RunTracker],
    progress: Progress,
    device: torch.device,
    average: Optional[WeightAverage] = None,
) -> None:
    """Train to `training.max_steps` or `training.max_minutes` and save the last checkpoint.

    Args:
        tracker: On rank 0; None elsewhere.
        average: Of the model's weights (training.ema_decay): validation and pictures use it.

    Raises:
        StoppedEarly: A signal came; a checkpoint was saved (exit code 75).
        DivergedError: The loss or the gradient is not finite; checkpoints with the weights that
            gave it are set aside.
    """
    with StopSignals() as signals:
        loop = _Loop(run, task, tracker, progress, device, average)
        while not loop.is_finished():
            stopped_by = loop.one_step(signals)
            if stopped_by is not None and not loop.is_finished():
                loop.saver.save()
                loop.close()
                barrier()  # the launcher ends all ranks as soon as one exits with a code
                raise StoppedEarly(
                    f"Stopped by {stopped_by} after step {progress.step} of "
                    f"{run.training.max_steps}; checkpoint saved in "
                    f"{run.run_folder / 'checkpoints'}. The same command goes on from there."
                )
        loop.finish()


class _Loop:
    def __init__(
        self,
        run: RunSettings,
        task: TrainingTask,
        tracker: Optional[RunTracker],
        progress: Progress,
        device: torch.device,
        average: Optional[WeightAverage],
    ) -> None:
        self.run, self.task, self.tracker = run, task, tracker
        self.progress, self.device, self.average = progress, device, average
        self.window: list[Mapping[str, float]] = []
        # Training alone: validation, pictures and saves are not in it.
        self.window_started_after_seconds = progress.elapsed_seconds
        # The last step whose weights gave a finite loss and gradient: one behind until they did.
        self.proven_step = progress.step - 1
        self.skipped_steps = 0
        self.saver = Saver(run, task, tracker, progress, average)
        on_terminal = is_rank_zero() and sys.stderr.isatty()
        self.bar = tqdm(
            total=run.training.max_steps,
            initial=progress.step,
            unit="step",
            desc=run.name,
            disable=not on_terminal,
        )

    def is_finished(self) -> bool:
        """A budget is used up, or validation gains nothing; the same answer on every rank."""
        is_used_up = self.progress.step >= self.run.training.max_steps
        return is_used_up or self._spent_share() >= 1.0 or self._gains_nothing()

    def _gains_nothing(self) -> bool:
        patience = self.run.training.early_stopping
        return 0 < patience <= self.progress.validations_without_gain

    def _spent_share(self) -> float:
        """Share of the time budget that is used up; 0 without one."""
        minutes = self.run.training.max_minutes
        return 0.0 if minutes is None else self.progress.elapsed_seconds / (60 * minutes)

    def one_step(self, signals: StopSignals) -> Optional[str]:
        """One optimizer step and what is due after it; the signal that any rank got to stop."""
        training, schedule = self.run.training, self.run.schedule
        started_at = time.monotonic()
        learning_rate = learning_rate_at(
            self.progress.step,
            peak=self.run.optimizer.learning_rate,
            warmup_steps=schedule.warmup_steps,
            max_steps=training.max_steps,
            decay=schedule.decay,
            final_ratio=schedule.final_ratio,
            spent_share=self._spent_share(),
        )
        set_learning_rate(self.task.engine, learning_rate)
        metrics = dict(self.task.train_step(self.progress.step))
        metrics["gradient_norm"] = gradient_norm(self.task.engine)
        if self.average is not None:
            self.average.update()
        self.progress.elapsed_seconds += time.monotonic() - started_at
        agreed = max_over_ranks(
            {
                "signal": float(signal.Signals[signals.received]) if signals.received else 0.0,
                "has_diverged": float(bool(self._not_finite(metrics))),
                "is_skipped": float(any(math.isinf(metrics[name]) for name in _norms(metrics))),
                "elapsed_seconds": self.progress.elapsed_seconds,
                "is_writing": float(self.saver.is_writing),
            },
            self.device,
        )
        if agreed["has_diverged"]:
            names = self._not_finite(metrics) or [self.task.main_loss]
            here = ", ".join(f"{name} {metrics[name]}" for name in names)
            self._diverged(
                f"{names[0]} is not finite at step {self.progress.step + 1} (on this rank {here}; "
                f"gradient norm {metrics['gradient_norm']})"
            )
        if not agreed["is_writing"]:
            self.saver.settle()  # what all ranks have written becomes a checkpoint
        stopped_by = signal.Signals(int(agreed["signal"])).name if agreed["signal"] else None
        self._count_skipped(agreed["is_skipped"] > 0)
        self.progress.elapsed_seconds = agreed["elapsed_seconds"]
        self.window.append(metrics)
        self.progress.step += 1
        self.bar.update()
        step, is_last = self.progress.step, self.is_finished()
        if step % training.log_every == 0 or is_last:
            self._log_window(learning_rate)
        if stopped_by is not None and not is_last:
            # Slurm kills 30 s after its SIGTERM: no time for more than the caller's save.
            return stopped_by
        if _due(step, training.validate_every) or is_last:
            self._validate(is_last)
            is_last = self.is_finished()
        # A skipped step changed nothing, and its save would push a better one out of keep_last.
        if (_due(step, self.run.checkpoint.every_steps) and not self.skipped_steps) or is_last:
            self.saver.save() if is_last else self.saver.save_on_the_way()
        if _due(step, training.sample_every) or is_last:
            self._draw()
        return stopped_by

    def _not_finite(self, metrics: Mapping[str, float]) -> list[str]:
        """The losses of this rank that must be finite and are not."""
        losses = [name for name in self.task.finite_losses if name in metrics]
        return [name for name in losses if not math.isfinite(metrics[name])]

    def _count_skipped(self, is_skipped: bool) -> None:
        """Of a step with a finite loss, before `progress` counts it.

        DeepSpeed leaves out a step whose gradient is not finite; only its norm, inf, tells.

        Now and then that is harmless; without an end the run would train nothing. (NaN stands for a
        norm that DeepSpeed did not keep.)
        """
        if not is_skipped:
            self.skipped_steps = 0
            self.proven_step = self.progress.step
            return
        self.skipped_steps += 1
        step = self.progress.step + 1
        _log.warning("step %d was skipped: its gradient is not finite", step)
        if self.skipped_steps == _MOST_SKIPPED_STEPS:
            self._diverged(
                f"The gradient is not finite at step {step} and the {self.skipped_steps - 1} "
                "before it, so none of them was taken"
            )

    def _diverged(self, what: str) -> NoReturn:
        """Set the checkpoints aside whose weights led here, and raise on all ranks."""
        self.saver.abandon()
        self._record({"health_not_finite_loss": 1.0})
        place = self._set_aside_unproven() if is_rank_zero() else ""
        self.close("FAILED")
        # All ranks wait for rank 0: the launcher ends all as soon as one exits with a code.
        place = broadcast_from_rank_zero(place)
        raise DivergedError(
            f"not_finite_loss: {what}. Lower optimizer.learning_rate (now "
            f"{self.run.optimizer.learning_rate}) or raise schedule.warmup_steps (now "
            f"{self.run.schedule.warmup_steps}), then run the same command again. {place}"
        )

    def _set_aside_unproven(self) -> str:
        """A save comes before the loss that shows what its weights are worth; says what is left."""
        run_folder = self.run.run_folder
        try:
            aside = set_aside_after(run_folder, self.proven_step)
        except OSError as error:
            return (
                f"Remove the checkpoints after step {self.proven_step} from {run_folder} first: "
                f"their weights are bad, and they cannot be set aside ({error})."
            )
        newest = newest_checkpoint(run_folder)
        place = (
            f"from {newest}" if newest is not None else "from the beginning, without a checkpoint"
        )
        told = f"It goes on {place}"
        if aside:
            names = ", ".join(path.name for path in aside)
            told += f"; what was saved after that has bad weights and was set aside as {names}"
        return f"{told}."

    def _log_window(self, learning_rate: float) -> None:
        seconds = self.progress.elapsed_seconds - self.window_started_after_seconds
        images = len(self.window) * self.run.batch.global_batch_images
        mine = _means(self.window)
        metrics = mean_over_ranks(mine, self.device)
        metrics.update(
            learning_rate=learning_rate,
            images_per_second=images / seconds,
            tokens_per_second=images * self.task.tokens_per_image / seconds,
            peak_memory_gib=peak_bytes(self.device) / 2**30,
            elapsed_seconds=self.progress.elapsed_seconds,
        )
        self._record(metrics)
        self.window = []
        self.window_started_after_seconds = self.progress.elapsed_seconds
        self.bar.set_postfix({self.task.main_loss: f"{metrics[self.task.main_loss]:.4f}"})
        if self.bar.disable:
            _log.info("step %d/%d  %s", self.progress.step, self.bar.total, _readable(metrics))

    def _validate(self, is_last: bool) -> None:
        with averaged_weights(self.average):
            metrics = {f"val_{key}": value for key, value in self.task.validate().items()}
        self.progress.validation, self.progress.validated_step = metrics, self.progress.step
        self._record(metrics)
        with self.bar.external_write_mode(file=sys.stderr):
            what = "validation" if self.average is None else "validation of the averaged weights"
            _log.info("step %d  %s  %s", self.progress.step, what, _readable(metrics))
        name = f"val_{self.task.main_loss}"
        self.progress.note_validation(metrics[name])
        if self._gains_nothing():
            _log.info(
                "%s has not fallen for %d validations: the run ends (training.early_stopping).",
                name,
                self.progress.validations_without_gain,
            )
        best_step = self.progress.best_validation_step
        is_kept = (self.run.run_folder / "checkpoints" / f"step_{best_step}").is_dir()
        is_kept = is_kept and self.run.checkpoint.keep_best > 0
        if self.is_finished() and is_kept and best_step != self.progress.step:
            _log.info(
                "%s was lowest at step %d: %.4g, now %.4g. `lgpt convert %s OUT --tag best` takes "
                "the checkpoint with the lowest.",
                name,
                best_step,
                self.progress.best_validation_loss,
                metrics[name],
                self.run.run_folder,
            )
        if is_last and not math.isfinite(metrics[name]):
            # No next loss will tell.
            self._diverged(f"{name} is not finite after the last step, {self.progress.step}")

    def _draw(self) -> None:
        with averaged_weights(self.average):
            pictures = self.task.draw(self.progress.step)
        if self.tracker is None:
            return
        folder = self.run.run_folder / "samples"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, picture in pictures.items():
                path = folder / f"step_{self.progress.step:07d}_{name}.png"
                picture.save(path)
                self.tracker.picture(self.progress.step, name, path)
        except OSError as error:
            _log.warning("pictures of step %d cannot be written: %s", self.progress.step, error)

    def _record(self, metrics: Mapping[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(self.progress.step, dict(metrics))

    def close(self, status: str = "KILLED") -> None:
        self.bar.close()
        if self.tracker is not None:
            self.tracker.finish(status)

    def finish(self) -> None:
        self.saver.save()
        self.close("FINISHED")


def _means(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric's mean over the steps that have it."""
    columns: dict[str, list[float]] = {}
    for metrics in window:
        for name, value in metrics.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


def _norms(metrics: Mapping[str, float]) -> list[str]:
    """The gradient norm of every engine that took the step."""
    return [name for name in metrics if name.endswith("gradient_norm")]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _readable(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
