"""When and how a run is saved: waiting for every byte, or while it trains on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Optional

from lgpt.checkpoint.folders import newest_checkpoint
from lgpt.checkpoint.retention import Keep
from lgpt.checkpoint.store import (
    PendingSave,
    abandon_save,
    begin_save,
    complete_save,
    save_checkpoint,
)
from lgpt.core.distributed import is_rank_zero
from lgpt.core.errors import CheckpointError
from lgpt.core.logging import get_logger
from lgpt.engine.average import WeightAverage
from lgpt.settings.phases import RunSettings
from lgpt.tracking.run_tracker import RunTracker
from lgpt.training.facts import checkpoint_facts, checkpoint_logits
from lgpt.training.run_progress import Progress
from lgpt.training.task import TrainingTask

_COMPANIONS = (
    "config.yaml",
    "ds_source.json",
    "ds_config.json",
    "model_config.json",
    "warm_start.json",
)

_log = get_logger(__name__)


class Saver:
    """The checkpoints of one run, at most one of them on its way. All ranks call its methods.

    Attributes:
        saved_step: The step of the newest checkpoint that this start has written or loaded.
    """

    def __init__(
        self,
        run: RunSettings,
        task: TrainingTask,
        tracker: Optional[RunTracker],
        progress: Progress,
        average: Optional[WeightAverage],
    ) -> None:
        self._average = average
        self._run, self._task, self._tracker, self._progress = run, task, tracker, progress
        self._pending: Optional[PendingSave] = None
        # A run that goes on has just been loaded from the checkpoint of its step.
        self.saved_step: Optional[int] = progress.step if progress.step > 0 else None
        self._companions = _read_companions(run.run_folder)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still writes; the loop asks all ranks."""
        return self._pending is not None and not self._pending.is_written

    def save(self) -> None:
        """See to a checkpoint of the current step that is whole on the disk.

        Raises:
            CheckpointError: On all ranks.
        """
        if self._pending is not None and self._pending.manifest.step == self._progress.step:
            self._complete()
        self.settle()
        if self.saved_step != self._progress.step:
            save_checkpoint(self._task.engines(), self._run.run_folder, **self._content())
            self.saved_step = self._progress.step

    def save_on_the_way(self) -> None:
        """A save that the next one can make up for, where the config says so."""
        self.settle()
        self._tolerate(self._begin if self._run.checkpoint.asynchronous else self.save)

    def settle(self) -> None:
        """Complete what is on its way, waiting for it."""
        if self._pending is not None:
            self._tolerate(self._complete)

    def abandon(self) -> None:
        """Let what is on its way come to nothing: its weights are bad."""
        if self._pending is not None:
            abandon_save(self._pending)
            self._pending = None

    def _begin(self) -> None:
        self._pending = begin_save(self._task.engines(), self._run.run_folder, **self._content())

    def _complete(self) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        complete_save(pending)
        self.saved_step = pending.manifest.step

    def _content(self) -> dict[str, Any]:
        """What `save_checkpoint` and `begin_save` are told."""
        checkpoint = self._run.checkpoint
        return {
            "step": self._progress.step,
            "trainer_state": {**asdict(self._progress), "task": self._task.state()},
            "keep": Keep(checkpoint.keep_last, checkpoint.keep_every, checkpoint.keep_best),
            "extra_files": {
                **self._companions,
                **checkpoint_logits(self._task, self._average),
            },
            "facts": self._facts() if is_rank_zero() else {},
            "averages": {} if self._average is None else {"model": self._average},
        }

    def _tolerate(self, action: Callable[[], None]) -> None:
        try:
            action()
        except CheckpointError as error:  # on all ranks
            if self._run.checkpoint.on_failed_save == "stop":
                raise
            if is_rank_zero():
                _log.warning(
                    "%s. Training goes on (checkpoint.on_failed_save: continue); a kill before the "
                    "next save, after %d more steps, loses all steps since %s.",
                    error,
                    self._run.checkpoint.every_steps,
                    newest_checkpoint(self._run.run_folder),
                )

    def _facts(self) -> dict[str, Any]:
        progress, name = self._progress, f"val_{self._task.main_loss}"
        facts = checkpoint_facts(self._run, self._task, progress.step)
        facts["mlflow_run_id"] = None if self._tracker is None else self._tracker.mlflow_run_id
        if progress.validated_step == progress.step:
            weights = "last" if self._average is None else "average"
            loss = progress.validation[name]
            facts["validation"] = {"name": name, "loss": loss, "weights": weights}
        return facts


def _read_companions(run_folder: Path) -> dict[str, str]:
    """What lies beside the weights in every checkpoint, as this start wrote it; only on rank 0."""
    if not is_rank_zero():
        return {}
    # ds_source.json is there only where the user's own JSON was named, warm_start.json only with
    # init_from.
    there = [name for name in _COMPANIONS if (run_folder / name).exists()]
    return {name: (run_folder / name).read_text() for name in there}
