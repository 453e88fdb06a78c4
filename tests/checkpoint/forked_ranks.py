"""Starts `lgpt train` on several ranks again and again, without importing torch each time.

As a program: a server that has imported everything once. For every JSON line on stdin it forks the
ranks, lets them train, kills them where the line says so, and answers with their exit codes. As a
module: `ForkedRanks`, which talks to it. The ranks are real processes with a real gloo group and
real signals; only DeepSpeed's launcher is missing (test_orphans.py has it).
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

# Where a rank is, counted in memory that all processes share: so a kill hits what it aims at.
PLACES = ("step", "validate", "draw", "stage", "complete", "publish", "prune", "load")
# And of a conversion.
PLACES += ("convert", "describe", "replace")
_PATIENCE_SECONDS = 500.0


@dataclass(frozen=True)
class Kill:
    """SIGKILL `ranks` a moment after rank 0 has come to `place` for the `count`th time."""

    place: str
    count: int
    delay_seconds: float
    ranks: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class Outcome:
    """How a start ended: exit codes (negative = killed by that signal) and what was printed."""

    codes: list[int]
    log: str
    items: list[int] = field(default_factory=list)
    """Numbers of the pictures that all ranks trained on, in any order."""


class ForkedRanks:
    """The server and its pipe."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "ranks.log"
        self._items = folder / "items.txt"
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of threads before the fork
                "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            },
        )

    def train(
        self,
        config: Path,
        *overrides: str,
        ranks: int = 2,
        kill: Optional[Kill] = None,
        max_file_bytes: Optional[int] = None,
    ) -> Outcome:
        """One start, to its end or its death."""
        words = ["train", str(config), *overrides]
        return self.command(*words, ranks=ranks, kill=kill, max_file_bytes=max_file_bytes)

    def command(
        self,
        *words: str,
        ranks: int = 1,
        kill: Optional[Kill] = None,
        max_file_bytes: Optional[int] = None,
    ) -> Outcome:
        """Any command of lgpt."""
        self._log.write_text("")
        self._items.write_text("")
        order = {
            "words": words,
            "ranks": ranks,
            "kill": None if kill is None else vars(kill),
            "log": str(self._log),
            "items": str(self._items),
            "max_file_bytes": max_file_bytes,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server died: " + self._log.read_text()[-3000:]
        items = [int(item) for item in self._items.read_text().split()]
        return Outcome(json.loads(answer)["codes"], self._log.read_text(), items)

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()


@contextmanager
def forked_ranks(folder: Path) -> Iterator[ForkedRanks]:
    """A server for as long as the tests of a module last."""
    server = ForkedRanks(folder)
    try:
        yield server
    finally:
        server.close()


def _serve() -> None:
    # All that is imported here costs the ranks nothing.
    import torch._dynamo  # noqa: F401

    from lgpt.core.logging import configure_logging
    from lgpt.engine.start import load_deepspeed
    from lgpt.training import train  # noqa: F401

    load_deepspeed()
    with suppress(ImportError):  # what every ZeRO engine of DeepSpeed 0.19 imports
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    configure_logging  # noqa: B018 - each rank configures its own
    gc.freeze()  # the ranks' collections leave what was imported alone
    counts = mmap.mmap(-1, 8 * len(PLACES))
    for line in sys.stdin:
        order = json.loads(line)
        counts[:] = bytes(8 * len(PLACES))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(order["ranks"]):
            child = os.fork()
            if child == 0:
                _be_a_rank(order, rank, port, counts)
            children.append(child)
        codes = _watch(children, order["kill"], counts)
        print(json.dumps({"codes": codes}), flush=True)


def _watch(children: Sequence[int], kill: Optional[dict[str, Any]], counts: mmap.mmap) -> list[int]:
    """Wait for the ranks' ends; kill on the way, and the rest when one rank is gone for good."""
    codes: dict[int, int] = {}
    started_at, last_end = time.monotonic(), 0.0
    while len(codes) < len(children):
        if kill is not None and _count(counts, kill["place"]) >= kill["count"]:
            time.sleep(kill["delay_seconds"])
            for rank in kill["ranks"]:
                if children[rank] not in codes:
                    os.kill(children[rank], signal.SIGKILL)
            kill = None
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
            last_end = time.monotonic()
        else:
            time.sleep(0.0005 if kill is not None else 0.01)
        late = codes and time.monotonic() - last_end > 30
        if late or time.monotonic() - started_at > _PATIENCE_SECONDS:
            for left in set(children) - set(codes):
                os.kill(left, signal.SIGKILL)
    return [codes[child] for child in children]


def _be_a_rank(order: dict[str, Any], rank: int, port: int, counts: mmap.mmap) -> None:
    code = 70
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(order["ranks"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        if order["max_file_bytes"] is not None:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["max_file_bytes"],) * 2)
        if rank == 0:
            _count_places(counts)
        _note_items(order["items"])
        sys.argv = ["lgpt", *order["words"]]
        from lgpt.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_places(counts: mmap.mmap) -> None:
    """Count rank 0's calls of what the places are called after."""
    from lgpt.checkpoint import export, export_folder, store
    from lgpt.training import resume
    from lgpt.training.train_transformer import TransformerTask
    from lgpt.training.train_vqvae import VqvaeTask

    def counted(owner: Any, name: str, place: str) -> None:
        plain = getattr(owner, name)

        def count_and_call(*args: Any, **options: Any) -> Any:
            index = PLACES.index(place)
            struct.pack_into("q", counts, 8 * index, _count(counts, place) + 1)
            return plain(*args, **options)

        setattr(owner, name, count_and_call)

    for task in (VqvaeTask, TransformerTask):
        counted(task, "train_step", "step")
        counted(task, "validate", "validate")
        counted(task, "draw", "draw")
    for name in ("stage", "complete", "publish"):
        counted(store, f"_{name}", name)
    counted(store, "prune", "prune")
    counted(resume, "load_checkpoint", "load")
    counted(export, "write_safetensors", "convert")
    counted(export, "_write_descriptions", "describe")
    counted(export_folder, "_publish", "replace")


def _note_items(path: str) -> None:
    """Write down which pictures this rank trains on, one short append a micro batch."""
    from lgpt.training.latent_batches import TrainingLatents
    from lgpt.training.train_vqvae import VqvaeTask

    notes = os.open(path, os.O_WRONLY | os.O_APPEND)

    def noted(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def note_and_call(self: Any, places: Any) -> Any:
            order = self.order if owner is VqvaeTask else self._order
            items = order.indices(int(places[0]), len(places)).tolist()
            os.write(notes, (" ".join(map(str, items)) + "\n").encode())
            return plain(self, places)

        setattr(owner, name, note_and_call)

    noted(VqvaeTask, "_training_images")
    noted(TrainingLatents, "at")


def _count(counts: mmap.mmap, place: str) -> int:
    (count,) = struct.unpack_from("q", counts, 8 * PLACES.index(place))
    return int(count)


if __name__ == "__main__":
    _serve()
