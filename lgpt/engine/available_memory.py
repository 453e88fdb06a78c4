"""How much memory this process can still take before the system, or its own group, has none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

# Files of a control group: limit, use, and the name of the page cache that is given back first.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def available_bytes(root: Path = Path("/")) -> Optional[int]:
    """The system's estimate, or what this process's control groups leave where that is less.

    Free pages alone would leave out the page cache: after a dataset was read, most of the memory.
    A batch job, or a container, has a limit of its own, which the system's figures do not show.

    Args:
        root: Where /proc and /sys are.

    Returns:
        None where the system does not tell.
    """
    amounts = [*_of_system(root), *_left_in_groups(root)]
    return max(0, min(amounts)) if amounts else None


def _of_system(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):  # in kB; since Linux 3.14
            yield int(line.split()[1]) * 1024
            return
    try:
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS knows no such name
        return


def _left_in_groups(root: Path) -> Iterator[int]:
    """One amount for every group with a limit, from this process's own up to the outermost."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", _VERSION_2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _VERSION_1
        else:
            continue
        # In a container the path may be the host's: then its own group is the mount itself.
        group = mount / path.lstrip("/") if ".." not in path else mount
        while True:
            yield from _left_in(group, *names)
            if group == mount:
                break
            group = group.parent


def _left_in(group: Path, limit_name: str, use_name: str, cache_name: str) -> Iterator[int]:
    limit, use = _lines(group / limit_name), _lines(group / use_name)
    if not limit or not use or limit[0] == "max":
        return
    counts = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat"))
    yield int(limit[0]) - int(use[0]) + int(counts.get(cache_name, 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
