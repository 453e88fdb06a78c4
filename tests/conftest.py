"""What holds for every test: CPU and offline, one thread a process, GPU tests only with a GPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest

# Before torch and DeepSpeed are imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
for _name in [n for n in os.environ if n.startswith(("LGPT_", "MLFLOW_"))]:
    # A user's own settings must not decide what tests see; LGPT_REQUIRE_... speaks to the tests.
    if not _name.startswith("LGPT_REQUIRE_"):
        del os.environ[_name]
# MLflow 3.17 otherwise starts eight more processes and a telemetry thread.
os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# jupyter_core 5.8, the last one with Python 3.9, otherwise warns at import, which is an error here.
os.environ["JUPYTER_PLATFORM_DIRS"] = "1"


def _cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on machines without one."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu") is not None]
    if gpu_items and not _cuda_is_there():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def beside_a_silent_hub(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program whose hub takes the connection and says nothing."""

    def run(program: str, *, timeout: float) -> subprocess.CompletedProcess[str]:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(20)
            environment = {
                "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
                "HF_HOME": str(tmp_path),
                "NO_PROXY": "127.0.0.1",
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": str(Path(__file__).parents[1]),
            }
            return subprocess.run(
                [sys.executable, "-c", program],
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )

    return run
