"""What holds for every test: CPU and offline, one thread a process, GPU tests only with a GPU."""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Callable

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
# Where the whole suite was started in the background, Ctrl-C is ignored, and by all it starts too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on machines without one; files with most slow tests come first.

    So no process is left alone with a long file at the end.
    """
    gpu_items = [item for item in items if item.get_closest_marker("gpu") is not None]
    if gpu_items and not _cuda_is_there():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    slow_tests = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow_tests[item.path])


# Session fixtures that are dear to set up: all files that use one run in the same process.
_SHARED_FIXTURES = re.compile(r"\bdef \w+\([^)]*\b(saves|server|slurm)\b")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole files, and all files with the same dear fixture.

    pytest-xdist's own groups (`loadgroup`, 3.8.0) have no effect with pytest 9.2.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        @functools.cache  # noqa: B019 - one scheduler a run
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            shared = _SHARED_FIXTURES.search((config.rootpath / file).read_text(encoding="utf-8"))
            return file if shared is None else shared[1]

    return ByFile(config, log)


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
