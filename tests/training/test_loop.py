"""The loop around a task that only counts: cadence, stops, skipped steps and divergence."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Optional

import pytest
import tiny
import torch
from PIL import Image

from lgpt.checkpoint import store
from lgpt.checkpoint.sources import find_checkpoint
from lgpt.core.errors import CheckpointError, DivergedError, StoppedEarly
from lgpt.settings.phases import RunSettings
from lgpt.settings.run import load_run_settings
from lgpt.tracking.metrics_file import MetricsFile, read_metrics
from lgpt.tracking.run_tracker import RunTracker
from lgpt.training import saving
from lgpt.training.loop import run_training
from lgpt.training.run_progress import Progress

COMPANIONS = ("config.yaml", "ds_config.json", "model_config.json")


class CountingTask:
    """Notes what the loop asks for; losses and gradient norms by the number of the step done."""

    main_loss = "recon_loss"
    finite_losses = ("recon_loss",)
    tokens_per_image = 16
    training_images = 48

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.losses: dict[int, float] = {}
        self.validation_loss = 1.0
        self.norms: dict[int, float] = {}
        self.on_step: Callable[[int], None] = lambda step: None
        self.engine: Any = SimpleNamespace(
            optimizer=SimpleNamespace(param_groups=[{"lr": 0.0}]),
            get_global_grad_norm=lambda: self.norms.get(self._step, 1.0),
        )

    def content(self) -> dict[str, Optional[str]]:
        return {"training_pictures": "of the test"}

    def build_engines(self, ds_config: dict[str, Any]) -> None:
        raise AssertionError("the loop builds nothing")

    def engines(self) -> dict[str, Any]:
        return {"model": self.engine}

    def state(self) -> dict[str, Any]:
        return {"asked": len(self.asked)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        raise AssertionError("the loop loads nothing")

    def train_step(self, step: int) -> Mapping[str, float]:
        self._step = step + 1
        self.asked.append(f"train {self._step}")
        self.on_step(self._step)
        return {"recon_loss": self.losses.get(self._step, 1.0)}

    def probe(self) -> Mapping[str, torch.Tensor]:
        return {}

    def validate(self) -> Mapping[str, float]:
        self.asked.append("validate")
        return {"recon_loss": self.validation_loss}

    def draw(self, step: int) -> Mapping[str, Image.Image]:
        self.asked.append("draw")
        return {"samples": Image.new("RGB", (2, 2))}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> CountingTask:
    """A task whose saves are real checkpoints, only without an engine's files in them."""
    counting = CountingTask()

    def save(engines: Any, run_folder: Path, step: int, **rest: Any) -> Path:
        counting.asked.append("save")
        return store.save_checkpoint({}, run_folder, step, **rest)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    return counting


def settings(folder: Path, max_steps: int, **changes: Any) -> RunSettings:
    config = tiny.vqvae_run(folder, max_steps, **changes)
    run = load_run_settings(tiny.write(folder / "run.yaml", config), environ={})
    run.run_folder.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        (run.run_folder / name).write_text(f"{name} of the start")
    return run


def go(
    run: RunSettings,
    task: CountingTask,
    done: Optional[Progress] = None,
    tracker: Optional[RunTracker] = None,
) -> Progress:
    progress = done or Progress()
    run_training(run, task, tracker, progress, torch.device("cpu"))
    return progress


def tracker_of(run: RunSettings) -> RunTracker:
    return RunTracker(run.run_folder, MetricsFile(run.run_folder), None)


def test_a_checkpoint_holds_what_later_steps_of_the_task_depend_on(tmp_path, task):
    run = settings(tmp_path, 4)
    go(run, task)
    state = json.loads(
        (run.run_folder / "checkpoints" / "step_4" / "trainer_state.json").read_text()
    )
    assert Progress(**state).task == {"asked": task.asked.index("save")}


def test_a_checkpoint_holds_the_configs_that_the_start_was_given(tmp_path, task):
    run = settings(tmp_path, 4)
    task.on_step = lambda step: (run.run_folder / "config.yaml").write_text("of another start")
    go(run, task)
    saved = run.run_folder / "checkpoints" / "step_4"
    assert (saved / "config.yaml").read_text() == "config.yaml of the start"
    assert {*COMPANIONS} < {path.name for path in saved.iterdir()}


def test_a_step_is_not_saved_again_whatever_a_rank_sees_on_the_disk(tmp_path, task):
    """A network file system may show ranks different things, and saving is done together."""
    run = settings(tmp_path, 4)
    progress = go(run, task)
    shutil.rmtree(run.run_folder / "checkpoints")
    go(run, task, progress)
    assert task.asked.count("save") == 1


def test_a_stop_signal_saves_at_once_even_where_validation_and_pictures_are_due(tmp_path, task):
    run = settings(tmp_path, 8, training={**tiny.training(8), "sample_every": 4})
    task.on_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 4 else None
    with pytest.raises(StoppedEarly, match=r"SIGTERM after step 4 of 8"):
        go(run, task)
    assert task.asked == ["train 1", "train 2", "train 3", "train 4", "save"]


def test_what_is_due_is_validated_then_saved_then_drawn(tmp_path, task):
    run = settings(tmp_path, 8, training={**tiny.training(8), "sample_every": 4})
    go(run, task)
    assert task.asked[4:7] == ["validate", "save", "draw"]
    assert task.asked[-4:] == ["train 8", "validate", "save", "draw"]


def test_a_stop_signal_at_the_last_step_changes_nothing(tmp_path, task):
    task.on_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 4 else None
    assert go(settings(tmp_path, 4), task).step == 4
    assert task.asked[-3:] == ["validate", "save", "draw"]


def test_ten_steps_in_a_row_without_a_finite_gradient_end_the_run(tmp_path, task):
    run = settings(tmp_path, 40)
    # DeepSpeed keeps no norm in some modes: that is no skipped step.
    task.norms = {1: float("nan"), **dict.fromkeys(range(6, 40), float("inf"))}
    with pytest.raises(DivergedError, match=r"gradient is not finite at step 15 and the 9 before"):
        go(run, task)
    assert not (run.run_folder / "DONE").exists()


def test_steps_skipped_now_and_then_are_told_and_survived(tmp_path, task, caplog):
    task.norms = {step: float("inf") for step in range(1, 41) if step % 10}
    assert go(settings(tmp_path, 40), task).step == 40
    assert "step 39 was skipped" in caplog.text
    assert "step 40 was skipped" not in caplog.text


def names_in(run: RunSettings) -> list[str]:
    names = [path.name for path in (run.run_folder / "checkpoints").iterdir()]
    return sorted(name for name in names if name != "checks.json")


def test_a_checkpoint_saved_before_its_weights_gave_a_loss_is_set_aside(tmp_path, task):
    run = settings(tmp_path, 12)
    task.losses = {9: float("nan")}
    with pytest.raises(DivergedError, match=r"step 9 .*step_4; .*aside as \.diverged_step_8"):
        go(run, task)
    assert names_in(run) == [".diverged_step_8", "latest", "step_4"]
    assert (run.run_folder / "checkpoints" / "latest").read_text() == "step_4\n"


def test_a_checkpoint_whose_weights_gave_a_finite_loss_stays(tmp_path, task):
    run = settings(tmp_path, 12)
    task.losses = {10: float("inf")}
    with pytest.raises(DivergedError, match=r"It goes on from .*step_8\.$"):
        go(run, task)
    assert names_in(run) == ["latest", "step_4", "step_8"]


def test_a_run_that_goes_on_into_the_same_loss_goes_one_checkpoint_further_back(tmp_path, task):
    run = settings(tmp_path, 12)
    task.losses = {9: float("nan")}
    progress = Progress()
    for left in ("from .*step_4", "from the beginning"):
        with pytest.raises(DivergedError, match=left):
            go(run, task, progress)
        task.losses, progress = {5: float("nan")}, Progress(step=4)
    assert names_in(run) == [".diverged_step_4", ".diverged_step_8"]


def test_skipped_steps_are_not_saved_and_do_not_prune_what_is_good(tmp_path, task):
    run = settings(tmp_path, 40, checkpoint={"every_steps": 2})
    task.norms = dict.fromkeys(range(9, 40), float("inf"))
    with pytest.raises(DivergedError, match=r"step_6; .* aside as \.diverged_step_8"):
        go(run, task)
    assert names_in(run) == [".diverged_step_8", "latest", "step_6"]


def test_a_validation_loss_that_is_not_finite_at_the_end_leaves_no_last_checkpoint(tmp_path, task):
    run = settings(tmp_path, 8)
    task.validation_loss = float("nan")
    with pytest.raises(DivergedError, match=r"val_recon_loss is not finite .* step, 8.*step_4"):
        go(run, task)
    assert names_in(run) == ["latest", "step_4"]
    assert task.asked[-2:] == ["train 8", "validate"]


def test_images_a_second_count_training_alone_whatever_the_cadence(tmp_path, task, monkeypatch):
    run = settings(tmp_path, 10, training={**tiny.training(10), "log_every": 5})
    task.on_step = lambda step: time.sleep(0.02)
    validate = task.validate

    def validate_slowly() -> Mapping[str, float]:
        time.sleep(0.5)  # after step 4, in the middle of a window
        return validate()

    monkeypatch.setattr(task, "validate", validate_slowly)
    go(run, task, tracker=tracker_of(run))
    rates = [line.metrics.get("images_per_second") for line in read_metrics(run.run_folder)]
    rates = [rate for rate in rates if rate is not None]
    assert len(rates) == 2
    # 8 images in 20 ms or somewhat more; with the validation in it, 40 in 0.6 s.
    assert all(80 < rate <= 400 for rate in rates), rates


def test_a_picture_that_cannot_be_written_does_not_end_the_run(tmp_path, task, caplog):
    run = settings(tmp_path, 4)
    (run.run_folder / "samples").write_text("no folder")
    assert go(run, task, tracker=tracker_of(run)).step == 4
    assert "pictures of step 4 cannot be written" in caplog.text


def patient(folder: Path, losses: list[float], **training: Any) -> tuple[RunSettings, Any]:
    run = settings(
        folder,
        40,
        training={**tiny.training(40), "early_stopping": 2, **training},
        checkpoint={"every_steps": 4},
    )
    found = iter(losses)

    def validate() -> Mapping[str, float]:
        return {"recon_loss": next(found)}

    return run, validate


def test_a_run_ends_when_validation_has_gained_nothing_twice_and_keeps_its_best(
    tmp_path, task, caplog
):
    run, task.validate = patient(tmp_path, [3.0, 2.0, 2.5, float("nan"), 1.0])
    with caplog.at_level("INFO", "lgpt"):
        progress = go(run, task)
    assert progress.step == 16
    assert (progress.best_validation_loss, progress.best_validation_step) == (2.0, 8)
    assert "--tag best" in caplog.text
    assert "at step 8" in caplog.text
    best = find_checkpoint(run.run_folder, "best").step_folder
    assert best == run.run_folder / "checkpoints" / "step_8"


def test_a_run_that_goes_on_has_not_forgotten_the_validations_before(tmp_path, task):
    run, task.validate = patient(tmp_path, [2.0, 2.5, 3.0, 1.0])
    task.on_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 9 else None
    progress = Progress()
    with pytest.raises(StoppedEarly):
        go(run, task, progress)
    state = json.loads(json.dumps(asdict(progress)))  # as a checkpoint keeps it
    assert go(run, task, Progress(**state)).step == 12


def test_without_early_stopping_a_rising_validation_loss_ends_nothing(tmp_path, task, caplog):
    run, task.validate = patient(tmp_path, [float(n) for n in range(10)], early_stopping=0)
    with caplog.at_level("INFO", "lgpt"):
        assert go(run, task).step == 40
    assert caplog.text.count("was lowest at step 4: 0, now 9") == 1
    best = find_checkpoint(run.run_folder, "best").step_folder
    assert best == run.run_folder / "checkpoints" / "step_4"


def test_a_best_step_that_was_not_saved_is_not_pointed_at(tmp_path, task, caplog):
    run, task.validate = patient(tmp_path, [float(n) for n in range(10)], early_stopping=0)
    often = run.checkpoint.model_copy(update={"every_steps": 30})
    with caplog.at_level("INFO", "lgpt"):
        assert go(run.model_copy(update={"checkpoint": often}), task).step == 40
    assert "--tag best" not in caplog.text


def test_a_run_whose_last_validation_is_its_best_points_at_no_other(tmp_path, task, caplog):
    run, task.validate = patient(tmp_path, [float(10 - n) for n in range(10)])
    with caplog.at_level("INFO", "lgpt"):
        assert go(run, task).step == 40
    assert "--tag best" not in caplog.text


def test_the_best_of_a_run_without_a_validated_checkpoint_is_refused(tmp_path, task):
    run = settings(tmp_path, 6, training={**tiny.training(6), "validate_every": 0})
    task.on_step = lambda step: signal.raise_signal(signal.SIGTERM) if step == 5 else None
    with pytest.raises(StoppedEarly):
        go(run, task)
    with pytest.raises(CheckpointError, match=r"saved right after a validation"):
        find_checkpoint(run.run_folder, "best")
