"""One launch on two ranks for all tests of saving, resuming and converting."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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
