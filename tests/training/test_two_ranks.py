"""What only ranks can get wrong, in one launch of two: late ones, time budgets, stops."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("two_ranks.py")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("two_ranks")
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [launcher, "--num_gpus", "2", "--master_port", str(port), str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads((folder / f"results_{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_meet_when_one_comes_late_to_a_random_text_encoder(results):
    first, second = (result["encoder"] for result in results)
    assert first["digest"] == second["digest"]
    assert (first["sum"], second["sum"]) == (3.0, 3.0)
    for refusal in (first["refusal"], second["refusal"]):
        assert "text_encoder is missing; run `lgpt prepare` first" in refusal
