"""One training a run folder: a second start waits a moment, then says who is at it.

Two at once take each other's staged checkpoints and metrics away. The lock is a POSIX record lock
on `<run>/.lock`: the kernel drops it with its process, however that ends, forked workers do not
inherit it, and NFS knows it too. There a node that dies may keep it: a Slurm job that starts again
takes it from its own earlier start.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path
from typing import IO, Optional

from lgpt.core.distributed import is_rank_zero
from lgpt.core.errors import SettingsError
from lgpt.core.logging import get_logger
from lgpt.engine.ranks import broadcast_from_rank_zero

_POLL_SECONDS = 0.5
_JOB = re.compile(r", Slurm job (\S+), start (\d+)$")

_log = get_logger(__name__)


class RunLock:
    """While entered, no other process trains in the run folder. All ranks enter it.

    Args:
        patience_seconds: How long a start waits for another one to end: the ranks of a launcher
            that was killed are still saving.

    Raises:
        SettingsError: On every rank: another process has it.
    """

    def __init__(self, run_folder: Path, patience_seconds: float = 60.0) -> None:
        self._path, self._patience_seconds = run_folder / ".lock", patience_seconds
        # Nothing else in this process may open it: closing any descriptor of it drops the lock.
        self._file: Optional[IO[str]] = None

    def __enter__(self) -> RunLock:
        holder = self._take() if is_rank_zero() else None
        holder = broadcast_from_rank_zero(holder)
        if holder is not None:
            self.__exit__()
            raise SettingsError(
                f"{self._path.parent} is being trained by another process ({holder}): wait for it "
                "or end it, then start again; or give another name=. If it is gone with its node, "
                f"remove {self._path}."
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def _take(self) -> Optional[str]:
        """Rank 0's part; who has it, when it is not to be had."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+", encoding="utf-8", errors="replace")
            if not self._wait_for(self._file):
                if not _is_an_earlier_start_of_this_job(self._holder()):
                    return self._holder()
                _log.warning("%s ended with its node: its lock is left to it", self._holder())
                self._file.close()
                self._path.unlink()
                self._file = self._path.open("a+", encoding="utf-8", errors="replace")
                if not _locked(self._file):
                    return self._holder()
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}{_job()}\n")
            self._file.flush()
        except OSError as error:
            # No locks there, or a folder that cannot be written, which the next write tells.
            _log.warning("%s cannot be locked (%s): start it only once", self._path.parent, error)
        return None

    def _wait_for(self, file: IO[str]) -> bool:
        give_up_at = time.monotonic() + self._patience_seconds
        if _locked(file):
            return True
        _log.info("Waiting for %s to leave %s", self._holder(), self._path.parent)
        while time.monotonic() < give_up_at:
            time.sleep(_POLL_SECONDS)
            if _locked(file):
                return True
        return False

    def _holder(self) -> str:
        assert self._file is not None
        self._file.seek(0)
        return self._file.read().strip() or "unknown"


def _job() -> str:
    """Which start of which Slurm job this is; nothing outside of one."""
    job = os.environ.get("SLURM_JOB_ID")
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    return "" if job is None else f", Slurm job {job}, start {start}"


def _is_an_earlier_start_of_this_job(holder: str) -> bool:
    """Slurm ends every process of a job before it starts the job again."""
    theirs, ours = _JOB.search(holder), _JOB.search(_job())
    return bool(theirs and ours and theirs[1] == ours[1] and int(theirs[2]) < int(ours[2]))


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
