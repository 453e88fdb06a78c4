"""`lgpt bench save`: a small real run, and what it reckons with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from lgpt.core.errors import SettingsError
from lgpt.settings.phases import Phase1, Phase3
from lgpt.settings.run import load_run_settings
from lgpt.training import bench_save as bench


def test_lost_time_is_what_a_round_takes_longer_than_without_a_save() -> None:
    seconds = {
        "no save": [10.0, 11.0, 12.0],
        "blocking": [15.0, 15.0, 18.0],
        "asynchronous": [10.5, 12.0, 12.5],
    }
    result = bench._summary(seconds, [0.1, 0.2, 0.3], steps=10, size=4, threads=1)
    assert result["lost_seconds"] == {"blocking": 5.0, "asynchronous": 0.5}
    assert result["lost_ratio"] == pytest.approx(0.1)
    assert (result["step_seconds"], result["asynchronous_call_seconds"]) == (1.1, 0.2)


@pytest.mark.slow
def test_both_kinds_are_saved_measured_and_removed(tmp_path: Path) -> None:
    """In a process of its own: it joins a process group, whose environment would stay behind."""
    vqvae = {"source": "custom", "checkpoint": "x", "codebook_size": 999, "downsample_factor": 4}
    transformer = {"layers": 1, "hidden": 64, "heads": 2}
    config = tiny.transformer_run(tmp_path, 4, vqvae=vqvae, transformer=transformer)
    path, work = tiny.write(tmp_path / "run.yaml", config), tmp_path / "work"
    command = [sys.executable, "-m", "lgpt", "bench", "save", str(path), "--work", str(work)]
    command += ["--steps", "2", "--rounds", "2", "--words", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert not work.exists()
    assert result["seconds"].keys() == set(bench.KINDS)
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["lost_ratio"] == pytest.approx(
        result["lost_seconds"]["asynchronous"] / result["lost_seconds"]["blocking"]
    )
    assert result["checkpoint_bytes"] > 12 * 1000  # masters and both moments
    assert bench.save_table(result).row_count == 3


def test_a_work_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    vqvae = {"source": "custom", "checkpoint": "x", "codebook_size": 999, "downsample_factor": 4}
    config = tiny.transformer_run(tmp_path, 4, vqvae=vqvae)
    run = load_run_settings(tiny.write(tmp_path / "run.yaml", config), environ={})
    assert isinstance(run, (Phase1, Phase3))
    with pytest.raises(SettingsError, match=r"--work .* exists"):
        bench.bench_save(run, steps=2, rounds=1, words=3, work=tmp_path)
