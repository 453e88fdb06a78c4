"""A start of training in this process, without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import tiny
import torch

from lgpt.checkpoint import load
from lgpt.checkpoint.manifest import Manifest
from lgpt.core.errors import CheckpointError, OutOfMemoryError
from lgpt.settings.run import load_run_settings
from lgpt.training import train as training
from lgpt.training.resume import Resume


def run_out_of_memory(*_: Any, **__: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def load_into_a_full_device(*_: Any) -> None:
    load._load_engine(SimpleNamespace(load_checkpoint=run_out_of_memory), Path("step_4"), "model")


@pytest.mark.parametrize(
    ("part", "fake"),
    [("VqvaeTask.build_engines", run_out_of_memory), ("load_resume", load_into_a_full_device)],
)
def test_a_full_device_is_told_even_before_the_first_step(tmp_path, monkeypatch, part, fake):
    config = tiny.write(tmp_path / "run.yaml", tiny.vqvae_run(tmp_path, 4))
    run = load_run_settings(config, environ={})
    monkeypatch.setattr(training, "start_process_group", lambda: torch.device("cpu"))
    monkeypatch.setattr(training, "find_whole_checkpoint", lambda folder: tmp_path / "step_4")
    manifest = Manifest(step=4, world_size=1, engines={}, files={}, versions={})
    resume = Resume(tmp_path / "step_4", manifest, run, run, run, "config")
    monkeypatch.setattr(training, "decide_resume", lambda *_: resume)
    monkeypatch.setattr(training.VqvaeTask, "build_engines", lambda *_: None)
    monkeypatch.setattr(f"lgpt.training.train.{part}", fake)
    with pytest.raises(OutOfMemoryError, match=r"micro_batch_images 2; lower it.*said: CUDA out"):
        training.train(run, {})


def test_a_done_run_without_checkpoints_is_not_begun_anew(tmp_path, monkeypatch):
    """More steps of it would be all steps, over its metrics and its model."""
    config = tiny.write(tmp_path / "run.yaml", tiny.vqvae_run(tmp_path, 4))
    run = load_run_settings(config, ["training.max_steps=6"], environ={})
    run.run_folder.mkdir(parents=True)
    done = {"step": 4, "max_steps": 4}
    kept = {"DONE": json.dumps(done), "config.yaml": "of the run that is done"}
    for name, text in kept.items():
        (run.run_folder / name).write_text(text)
    monkeypatch.setattr(training, "start_process_group", lambda: torch.device("cpu"))
    monkeypatch.setattr(training, "_train_from", lambda *_: pytest.fail("it began at step 0"))
    with pytest.raises(CheckpointError, match=r"has no checkpoint to go on from.*name="):
        training.train(run, {})
    assert {name: (run.run_folder / name).read_text() for name in kept} == kept
