"""Memory that is left, on trees of /proc and /sys as systems have them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lgpt.engine.available_memory import available_bytes

GIB = 2**30
MEMINFO = "MemTotal: 66060288 kB\nMemFree: 1048576 kB\nMemAvailable: 33554432 kB\n"  # 63, 1, 32 GiB
NO_LIMIT = 9223372036854771712


def _system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _group(limit: object, use: int, cache: int, version: int = 2) -> dict[str, str]:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return {
        names[0]: f"{limit}\n",
        names[1]: f"{use}\n",
        "memory.stat": f"anon 5\n{names[2]} {cache}\nactive_file 7\n",
    }


def _at(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


def test_the_page_cache_counts_as_available(tmp_path: Path):
    assert available_bytes(_system(tmp_path, {})) == 32 * GIB


def test_a_batch_jobs_limit_counts_where_it_leaves_less(tmp_path: Path):
    files = {"proc/self/cgroup": "0::/slurm/job_7/step_0\n"}
    files |= _at("sys/fs/cgroup/slurm/job_7/step_0", _group("max", 9 * GIB, 0))
    files |= _at("sys/fs/cgroup/slurm/job_7", _group(16 * GIB, 10 * GIB, 3 * GIB))
    files |= _at("sys/fs/cgroup/slurm", _group(64 * GIB, 20 * GIB, 0))
    assert available_bytes(_system(tmp_path, files)) == 9 * GIB


def test_a_limit_above_what_the_system_has_changes_nothing(tmp_path: Path):
    files = {"proc/self/cgroup": "0::/\n"}
    files |= _at("sys/fs/cgroup", _group(64 * GIB, GIB, 0))
    assert available_bytes(_system(tmp_path, files)) == 32 * GIB


@pytest.mark.parametrize("path", ["/docker/of_the_host", "/../../elsewhere", "/"])
def test_a_containers_own_group_is_the_mount(tmp_path: Path, path: str):
    files = {"proc/self/cgroup": f"0::{path}\n"}
    files |= _at("sys/fs/cgroup", _group(8 * GIB, 3 * GIB, GIB))
    assert available_bytes(_system(tmp_path, files)) == 6 * GIB


def test_version_1_has_other_names(tmp_path: Path):
    files = {"proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/job\n0::/\n"}
    files |= _at("sys/fs/cgroup/memory/job", _group(4 * GIB, 2 * GIB, GIB, version=1))
    files |= _at("sys/fs/cgroup/memory", _group(NO_LIMIT, 30 * GIB, 0, version=1))
    assert available_bytes(_system(tmp_path, files)) == 3 * GIB


def test_a_group_that_is_full_leaves_nothing(tmp_path: Path):
    files = {"proc/self/cgroup": "0::/\n"}
    files |= _at("sys/fs/cgroup", _group(8 * GIB, 9 * GIB, 0))
    assert available_bytes(_system(tmp_path, files)) == 0


def test_a_system_that_tells_nothing_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(name: str) -> int:
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(os, "sysconf", unknown)
    assert available_bytes(tmp_path) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/meminfo")
def test_here_it_is_some_of_the_machines_memory():
    available = available_bytes()
    assert available is not None
    assert 0 < available < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
