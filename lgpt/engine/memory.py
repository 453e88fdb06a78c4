"""Memory of this process: what it has used at most, and what it keeps for the next step."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Any, Optional

import torch


def peak_bytes(device: torch.device) -> int:
    """Most bytes allocated so far: on CUDA by torch, on a CPU the process's peak resident set.

    Counted from the start, or from the last `forget_peak`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    own = _own_peak_bytes()
    if own is not None:
        return own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _own_peak_bytes() -> Optional[int]:
    """Linux's VmHWM. rusage's figure begins with what the parent had at the start."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) * 1024 if found else None


def forget_peak(device: torch.device) -> bool:
    """Let `peak_bytes` count from what is in use now.

    Returns:
        False where the system cannot: then it still counts from the start of the process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    trim = _of_malloc("malloc_trim")
    if trim is not None:
        trim(0)  # freed memory that has stayed with the process is not in use
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_bytes() -> Optional[tuple[int, int]]:
    """Of this process now, and those of them that are not pages of files; None but on Linux."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return None
    page = resource.getpagesize()
    return int(fields[1]) * page, (int(fields[1]) - int(fields[2])) * page


def _of_malloc(name: str) -> Any:
    """A function of this process's C library; None where it has none of that name."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return getattr(libc, name, None)


# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory(device: torch.device) -> bool:
    """On a CPU with glibc, let freed tensors' memory stay with the process.

    By default every tensor over 32 MiB (often much less) is mapped from the system and given back,
    and the next step pays for clearing each of its pages again. A ZeRO-2 step of 73M parameters on
    512 tokens took 1.5 s of one core with it, 2.7 s without (torch 2.13); peak memory grew by 4%.
    The trim threshold is switched off, for the largest that mallopt takes is 2 GiB: with that one
    the float32 gradients of 512M parameters were given back and cleared anew in every step.

    Who sets `MALLOC_MMAP_THRESHOLD_` has decided otherwise. Checkpointed blocks give `Holes` back.

    Returns:
        True when it was switched on.
    """
    if device.type != "cpu" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = _of_malloc("mallopt")
    if mallopt is None:  # musl has none
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


_OFTEN, _FORGOTTEN, _MORE = 3, 1 / 8, 1.5

_MALLINFO2 = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"]
_MALLINFO2 += ["fordblks", "keepcost"]


class _Mallinfo2(ctypes.Structure):
    """glibc's malloc.h: `uordblks` bytes of the heap are in use, `hblkhd` are mapped one by one."""

    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO2]


class Holes:
    """With glibc: free memory between live tensors, which can be given back to the system.

    An aligned tensor seldom fits into the hole that an equal one left (glibc 2.36), so memory that
    is freed layer by layer grows in holes: a checkpointed step of 24 layers of width 1,024 on 8,192
    tokens had 18.4 GiB. With holes of 3 GiB at most it had 12.3 and took 67 s. Beginning with 1 GiB
    it had 11.6 (2.2 were allowed by then) and took 66 s; on half the tokens 10.3 instead of 11.2,
    and took 1.08 to 1.13 times as long. There 0.4 GiB gave the same peak: it is within one block.
    """

    def __init__(self, most_bytes: int = 2**30) -> None:
        self._most_bytes = most_bytes
        self._often = 0.0
        self._mallinfo2 = _of_malloc("mallinfo2")  # not in musl, nor before glibc 2.33
        self._trim = _of_malloc("malloc_trim")
        if self._mallinfo2 is not None:
            self._mallinfo2.restype = _Mallinfo2

    def give_back(self) -> bool:
        """Give them back when they are more than the most that may be.

        What comes back soon is no hole but what a layer needs, or another library's: after three
        times half as much again may be. Eight looks at few holes make up for one time.

        Returns:
            True when the system was given something.
        """
        if self._mallinfo2 is None:
            return False
        resident = resident_bytes()
        if resident is None or not self._are_too_many(resident[1]):
            self._often = max(0.0, self._often - _FORGOTTEN)
            return False
        self._often += 1
        if self._often >= _OFTEN:
            self._often, self._most_bytes = 0.0, int(_MORE * self._most_bytes)
        return bool(self._trim(0))

    def _are_too_many(self, own_bytes: int) -> bool:
        if own_bytes <= self._most_bytes:  # without a walk through the heap
            return False
        used = self._mallinfo2()
        return own_bytes - int(used.uordblks) - int(used.hblkhd) > self._most_bytes
