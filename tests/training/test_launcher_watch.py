"""Ranks whose launcher was killed save a checkpoint and end; none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from lgpt.checkpoint.folders import newest_checkpoint, verify

RANK = """
import os, signal, sys, time
from lgpt.training.launcher_watch import LauncherWatch
signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1], "a").write("told\\n"))
with LauncherWatch(poll_seconds=0.05, grace_seconds=0.5):
    open(sys.argv[1], "w").write(f"{os.getpid()}\\n")
    time.sleep(60)
open(sys.argv[1], "a").write("outlived\\n")
"""
ROOT = Path(__file__).resolve().parents[2]
PARENT = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def wait_until(condition, seconds: float = 120.0) -> None:
    ends_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_rank_whose_parent_was_killed_is_told_and_then_ended(tmp_path):
    log = tmp_path / "log"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, sys.executable, "-c", RANK, str(log)],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)},
    )
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
    rank = int(log.read_text())
    time.sleep(0.3)
    assert is_alive(rank)
    assert "told" not in log.read_text()
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(rank), 30)
    assert log.read_text().splitlines()[1:] == ["told"]


@pytest.mark.slow
def test_killing_the_deepspeed_command_alone_leaves_a_checkpoint_and_no_orphans(tmp_path):
    config = tiny.write(
        tmp_path / "a.yaml",
        tiny.vqvae_run(
            tmp_path,
            100_000,
            checkpoint={"every_steps": 2},
            tracking={"enabled": False},
            training={**tiny.training(100_000), "validate_every": 0},
        ),
    )
    run_folder = tmp_path / "runs" / "tiny-phase2"
    log = tmp_path / "log"
    with log.open("w") as stream:
        runner = subprocess.Popen(
            [*tiny.launcher(), "--module", "lgpt", "train", str(config)],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        )
        wait_until(lambda: newest_checkpoint(run_folder) is not None, 400)
        children = descendants_of(runner.pid)
        assert len(children) >= 3, "launch.py and two ranks"
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    wait_until(lambda: not any(map(is_alive, children)), 300)
    text = log.read_text()
    assert "The launcher (process " in text
    assert "Stopped by SIGTERM after step" in text
    newest = newest_checkpoint(run_folder)
    assert newest is not None
    assert verify(newest, deep=True) == []


def descendants_of(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        left += parents.get(left[0], [])
        found += parents.get(left.pop(0), [])
    return found
