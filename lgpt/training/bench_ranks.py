"""A measuring program as several ranks on this machine, each a process of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack

from lgpt.engine.start import free_port

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_ranks(command: Sequence[str], ranks: int) -> tuple[list[int], list[str], list[str]]:
    """Run the command as `ranks` ranks to the end, or until one fails: the others end with it.

    They share this process's cores, as in `launch/`: PyTorch would give all of them to each.
    DeepSpeed's launcher does so too, unless told to bind ranks. OMP_NUM_THREADS decides otherwise.

    Args:
        ranks: With one, the program is started as by hand.

    Returns:
        Exit codes (negative: the signal that ended it), stdout and stderr, one a rank.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHED}
    if ranks > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    with ExitStack() as stack:
        files = [
            tuple(stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            for _ in range(ranks)
        ]
        port = free_port()
        running = [
            subprocess.Popen(
                command,
                stdout=out,
                stderr=error,
                env=environment if ranks == 1 else {**environment, **_place(rank, ranks, port)},
            )
            for rank, (out, error) in enumerate(files)
        ]
        try:
            while None in (so_far := [each.poll() for each in running]):
                if any(so_far):
                    time.sleep(1)  # so that the others can say the same
                    break
                time.sleep(0.05)
        finally:
            ended = [each.poll() for each in running]
            for each in running:
                each.kill()
                each.wait()
        # What was ended here failed for nothing of its own.
        codes = [0 if code is None else code for code in ended]
        texts = [[_all_of(file) for file in pair] for pair in files]
    return codes, [out for out, _ in texts], [error for _, error in texts]


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: a batch job may have a few of the machine's
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    values = (rank, rank, ranks, "127.0.0.1", port)
    return {name: str(value) for name, value in zip(_LAUNCHED, values)}


def _all_of(file: object) -> str:
    file.seek(0)  # type: ignore[attr-defined]
    return str(file.read())  # type: ignore[attr-defined]
