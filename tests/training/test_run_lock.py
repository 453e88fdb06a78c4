"""A run folder is trained by one process at a time, whatever becomes of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lgpt.core.errors import SettingsError
from lgpt.training.run_lock import RunLock

_HOLDER = """
import multiprocessing, pathlib, sys, time
from lgpt.training.run_lock import RunLock
with RunLock(pathlib.Path(sys.argv[1])):
    # A data worker, which may outlive a killed rank for seconds.
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    print(worker.pid, flush=True)
    sys.stdin.readline()
    worker.kill()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which trains in `tmp_path / run`."""
    yield from _held(tmp_path)


@pytest.fixture
def holder_in_a_job(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The same in the second start of Slurm's job 7."""
    yield from _held(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")


def _held(folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(folder / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        worker = int(process.stdout.readline())
        yield process
        process.kill()
        with suppress(ProcessLookupError):
            os.kill(worker, 9)


def test_a_second_start_is_told_who_is_at_it(tmp_path, holder):
    told = rf"run is being trained by another process \(process {holder.pid} on "
    with pytest.raises(SettingsError, match=told), RunLock(tmp_path / "run", 0.0):
        pass
    with RunLock(tmp_path / "another run", 0.0):
        pass


@pytest.mark.parametrize(
    ("job", "start", "may_take_it"), [(7, 2, True), (7, 1, False), (8, 2, False)]
)
def test_a_job_that_starts_again_takes_the_lock_that_a_dead_node_kept(
    tmp_path, holder_in_a_job, monkeypatch, job, start, may_take_it
):
    monkeypatch.setenv("SLURM_JOB_ID", str(job))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
    if not may_take_it:
        with pytest.raises(SettingsError, match=r"Slurm job 7, start 1\).* remove .*\.lock"):
            RunLock(tmp_path / "run", 0.0).__enter__()
        return
    with RunLock(tmp_path / "run", 0.0):
        assert lock_text(tmp_path).endswith(", Slurm job 7, start 2\n")
        assert holder_in_a_job.poll() is None, "the lock was still held"


def test_a_start_waits_for_one_that_is_about_to_end(tmp_path, holder):
    threading.Timer(1.0, holder.stdin.close).start()
    with RunLock(tmp_path / "run", 60.0):
        assert re.fullmatch(rf"process {os.getpid()} on .+\n", lock_text(tmp_path))


def test_a_killed_training_leaves_the_folder_free_though_its_workers_live(tmp_path, holder):
    holder.kill()
    holder.wait(60)
    with RunLock(tmp_path / "run", 0.0):
        pass


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path, caplog):
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with RunLock(tmp_path / "run"):
        assert "cannot be locked" in caplog.text
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()
    with RunLock(tmp_path / "run"):
        pass


def lock_text(folder: Path) -> str:
    done = subprocess.run(
        ["cat", str(folder / "run" / ".lock")], capture_output=True, text=True, check=True
    )
    return done.stdout
