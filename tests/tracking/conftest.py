"""A real MLflow server for the tests of tracking; slow to start, so one for all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_START_SECONDS = 120


class MlflowServer:
    """`mlflow server` over sqlite in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"http://127.0.0.1:{free_port()}"
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                    *("--backend-store-uri", f"sqlite:///{folder / 'server.db'}"),
                    *("--artifacts-destination", str(folder / "artifacts")),
                    *("--host", "127.0.0.1", "--port", self.uri.rsplit(":", 1)[1]),
                ],
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
            )
        self._wait()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """The server takes connections but answers nothing."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self.end()
        raise RuntimeError(f"mlflow server did not start:\n{self._log.read_text()[-3000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path_factory.mktemp("mlflow_server"))
    yield running
    running.end()


@pytest.fixture
def refusing_uri() -> str:
    """An address at which nothing listens."""
    return f"http://127.0.0.1:{free_port()}"
