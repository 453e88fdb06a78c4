"""`lgpt bench vqvae-step`: all parts of both players are in the sum, and the bare ones learn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from lgpt.settings.run import load_run_settings
from lgpt.training import bench_vqvae_step
from lgpt.training.bench_vqvae_step import _Bare, _figures, step_table
from lgpt.training.train_vqvae import VqvaeTask

SMALL = [
    "data.dataset=shapes",
    "data.resolution=16",
    "data.shapes.train_images=24",
    "data.shapes.val_images=18",
    "vqvae.resolution=16",
    "vqvae.codebook_size=32",
    "loss.adversarial=hinge",
    "discriminator.layers=1",
    "discriminator.channels=16",
    "discriminator.start_step=1000",
]
PARTS = ["vqvae_forward", "adversarial_gradient", "vqvae_backward", "vqvae_optimizer"]
PARTS += ["discriminator", "discriminator_optimizer"]


@pytest.mark.slow
def test_a_step_and_all_its_parts_are_measured():
    command = [sys.executable, "-m", "lgpt", "bench", "vqvae-step", "demo/phase2_openmoji_f8"]
    command += [*SMALL, "--rounds", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for clock in ("cpu", "wall"):
        assert list(result[f"parts_{clock}_seconds"]) == PARTS
        assert all(seconds > 0 for seconds in result[f"parts_{clock}_seconds"].values())
        assert result[f"step_{clock}_seconds"] > 0
        assert result[f"engines_{clock}_seconds"] > 0
        assert result[f"ratio_{clock}"] > 0
        assert result[f"ratio_engines_{clock}"] > 0
    assert result["rounds"] == 2
    rate = result["images"] / result["step_wall_seconds"]
    assert result["images_per_second"] == pytest.approx(rate)
    assert result["tokens_per_second"] == pytest.approx(rate * (16 // 8) ** 2)
    assert 0 < result["flops_utilisation"] < 1.5  # on a busy machine either may be slow
    flops = result["flops_utilisation"] * result["product_flops_per_second"]
    assert flops == pytest.approx(result["step_flops"] / result["step_wall_seconds"])
    assert "images/s" in str(step_table(result).caption)
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert result["peak_bytes"] > 2**26


def test_the_peak_is_of_our_steps_alone(monkeypatch):
    done = []
    monkeypatch.setattr(bench_vqvae_step, "_our_step", lambda task, step: done.append(step))
    monkeypatch.setattr(bench_vqvae_step, "forget_peak", lambda device: done.append("forget"))
    task = object.__new__(VqvaeTask)
    task.device = torch.device("cpu")
    assert bench_vqvae_step._peak_of_our_steps(task) is None
    monkeypatch.setattr(bench_vqvae_step, "forget_peak", lambda device: not done.append("forget"))
    monkeypatch.setattr(bench_vqvae_step, "peak_bytes", lambda device: len(done))
    done.clear()
    assert bench_vqvae_step._peak_of_our_steps(task) == 3
    assert done == ["forget", 0, 1]


def test_the_ratio_is_the_median_of_the_rounds_own():
    measured = [
        (
            {"step_cpu_seconds": mine, "step_wall_seconds": 2 * mine},
            {"engines_cpu_seconds": mine / 2, "engines_wall_seconds": mine - 1},
            {"a_cpu_seconds": 1.0, "b_cpu_seconds": rest, "a_wall_seconds": 4.0},
        )
        for mine, rest in ((3.0, 1.0), (2.0, 3.0), (9.0, 2.0))
    ]
    figures = _figures(measured)
    assert figures["ratio_cpu"] == statistics.median([3 / 2, 2 / 4, 9 / 3])
    assert figures["ratio_wall"] == statistics.median([6 / 4, 4 / 4, 18 / 4])
    assert figures["ratio_engines_cpu"] == 2.0
    assert figures["ratio_engines_wall"] == statistics.median([6 / 2, 4 / 1, 18 / 8])
    assert figures["engines_wall_seconds"] == 2.0
    assert figures["parts_cpu_seconds"] == {"a": 1.0, "b": 2.0}
    assert figures["sum_of_parts_cpu_seconds"] == 3.0


def test_bare_steps_teach_both_players(tmp_path):
    config = tiny.vqvae_run(tmp_path, 60, loss={"adversarial": "hinge"})
    config["discriminator"] = {"layers": 1, "channels": 16, "start_step": 5, "warmup_steps": 0}
    config["discriminator"]["weight"] = 1e-6  # the pictures are noise, and their loss is to fall
    run = load_run_settings(tiny.write(tmp_path / "run.yaml", config), environ={})
    task = VqvaeTask(run, torch.device("cpu"))
    task.engine = SimpleNamespace(module=task.model)
    bare = _Bare(task, task.model, task.adversary.model)
    before = [next(p.detach().clone() for p in each.parameters()) for each in bare._players]
    first = bare._losses(task.model(bare.images))[0].item()
    for _ in range(15):
        bare.step()
    assert bare._losses(task.model(bare.images))[0].item() < first
    for player, weight in zip(bare._players, before):
        assert not torch.equal(next(player.parameters()), weight)
