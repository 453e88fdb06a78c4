"""No rank outlives its launcher: one that is left alone saves a checkpoint and ends.

DeepSpeed's launcher is two processes, `deepspeed` and the `launch.py` that it starts. Killed with
SIGKILL (a person, the out-of-memory killer), neither takes its children along: the ranks train on
for days, unseen, on devices that a new start wants.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Optional

from lgpt.core.distributed import is_launched
from lgpt.core.logging import get_logger

_GRACE_SECONDS = 300.0  # for the step that is running, and its save

_log = get_logger(__name__)


class LauncherWatch:
    """While entered, the death of a launcher counts as SIGTERM; a rank that hangs then is ended.

    Nothing happens in a process that no launcher started, or without /proc.

    Args:
        poll_seconds: How often the launchers are looked for.
        grace_seconds: From the SIGTERM to the end, for a rank that waits for others that are gone.
    """

    def __init__(self, poll_seconds: float = 1.0, grace_seconds: float = _GRACE_SECONDS) -> None:
        self._poll_seconds, self._grace_seconds = poll_seconds, grace_seconds
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lgpt-launcher", daemon=True)
        self._launchers = _launchers() if is_launched() else {}

    def __enter__(self) -> LauncherWatch:
        if self._launchers:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(self._poll_seconds):
            gone = [pid for pid, started in self._launchers.items() if _started(pid) != started]
            if not gone:
                continue
            _log.warning(
                "The launcher (process %s) is gone: this rank saves a checkpoint and ends.",
                ", ".join(map(str, gone)),
            )
            os.kill(os.getpid(), signal.SIGTERM)
            if not self._is_over.wait(self._grace_seconds):
                os._exit(1)
            return


def _launchers() -> dict[int, str]:
    """Process ids of our parent and, when that is DeepSpeed's, of its parent; and their starts."""
    found: dict[int, str] = {}
    parent = os.getppid()
    for pid in (parent, _parent_of(parent)):
        started = None if pid is None else _started(pid)
        if pid is None or started is None or (found and "deepspeed" not in _command(pid)):
            break
        found[pid] = started
    return found


def _stat(pid: int) -> Optional[list[str]]:
    """The fields of /proc/<pid>/stat after the name, which may hold spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _started(pid: int) -> Optional[str]:
    """When a process started, in ticks: a process id alone may be taken again. None: it is gone."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def _parent_of(pid: int) -> Optional[int]:
    fields = _stat(pid)
    return None if fields is None or int(fields[1]) <= 1 else int(fields[1])


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
