"""Ranks for tests of checkpoints: one launch for saving and converting, forked ones for runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import ForkedRanks, forked_ranks

WORKER = Path(__file__).with_name("two_rank_saves.py")


@dataclass
class TwoRankSaves:
    """What the launch left: a run folder a case, and each rank's results."""

    folder: Path
    results: list[dict[str, Any]]
    output: str

    def step(self, case: str, step: int) -> Path:
        return self.folder / case / "checkpoints" / f"step_{step}"


@pytest.fixture(scope="session")
def saves(tmp_path_factory: pytest.TempPathFactory) -> TwoRankSaves:
    folder = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    done = subprocess.run(
        [*launcher, "--master_port", str(port), str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(WORKER.parents[2]),
        },
    )
    output = done.stdout + done.stderr
    files = [folder / f"results_{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), output[-5000:]
    assert done.returncode != 0, "the last save was to be killed"
    return TwoRankSaves(folder, [json.loads(file.read_text()) for file in files], output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of one file of tests are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[ForkedRanks]:
    """Two ranks that are forked for each run, for one file of tests."""
    with forked_ranks(folder) as server:
        yield server
