"""What a process keeps of the memory it has freed."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lgpt.engine.memory import Holes, forget_peak, keep_freed_memory, peak_bytes

_FAULTS_OF_LATER_STEPS = """
import resource, statistics, sys
import torch
from lgpt.engine.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory(torch.device("cpu"))
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(int(mebi) << 20) for mebi in sys.argv[2:]]
    for tensor in kept:
        float((tensor[: 12 << 20] * 2).sum())
    del kept
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults[4:])))  # now and then a step finds its room torn
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_tensors_are_not_mapped_again() -> None:
    pages = 26 * 2**22 // 4096
    sizes = ("1", "8", "3", "12", "2")
    assert _faults("plain", *sizes) > pages
    assert _faults("keep", *sizes) < pages / 10


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_more_than_2_gib_stay_too() -> None:
    """ZeRO-2 makes 2 GB of float32 gradients anew in every step of 500M parameters."""
    assert _faults("keep", "1", "600") < 600 * 2**22 // 4096 / 10


def _faults(mode: str, *mebi_floats: str) -> int:
    """Pages that the system had to clear in a later step."""
    (faults,) = _lines_of(_FAULTS_OF_LATER_STEPS, mode, *mebi_floats)
    return int(faults)


_HOLES_BETWEEN_TENSORS = """
import torch
from lgpt.engine.memory import Holes, keep_freed_memory, resident_bytes
assert keep_freed_memory(torch.device("cpu"))
layers = [(torch.ones(4 << 20), torch.ones(4 << 10)) for _ in range(40)]
kept = [small for _, small in layers]
del layers
_, before = resident_bytes()
print(*(Holes(most << 20).give_back() for most in (1000, 400, 400)))
print(before - resident_bytes()[1] >> 20, *{float(small.sum()) for small in kept})
"""
_NO_HOLES = """
import mmap
from lgpt.engine.memory import Holes
other = mmap.mmap(-1, 500 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, len(other), 4096):
    other[page] = 1
holes, trims = Holes(300 << 20), []
holes._trim = lambda pad: trims.append(pad) or 1
print([holes.give_back() for _ in range(8)], len(trims))
"""
needs_mallinfo2 = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="glibc's, since 2.33",
)


@needs_mallinfo2
def test_holes_of_640_mib_are_given_back_where_400_are_the_most() -> None:
    told, found = _lines_of(_HOLES_BETWEEN_TENSORS)
    assert told == "False True False"
    mebibytes, sums = found.split()
    assert 600 < int(mebibytes) < 800
    assert float(sums) == 4096


@needs_mallinfo2
def test_what_stays_is_not_tried_again_and_again() -> None:
    """Another library's 500 MiB look like holes: 300 may be, 450 and 675 after three times each."""
    assert _lines_of(_NO_HOLES) == [f"{6 * [True] + 2 * [False]} 6"]


@needs_mallinfo2
def test_what_comes_back_at_every_second_look_is_allowed_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block of 0.6 GiB has it twice, in turn, where its tensors miss the holes of its equals."""
    mebibytes = itertools.cycle([1200, 600])
    monkeypatch.setattr("lgpt.engine.memory.resident_bytes", lambda: (0, next(mebibytes) << 20))
    holes = Holes(1 << 30)
    monkeypatch.setattr(holes, "_mallinfo2", lambda: SimpleNamespace(uordblks=0, hblkhd=0))
    monkeypatch.setattr(holes, "_trim", lambda pad: 1)
    assert [holes.give_back() for _ in range(20)] == 4 * [True, False] + 12 * [False]


def _lines_of(program: str, *words: str) -> list[str]:
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, check=True, timeout=300, text=True)
    return done.stdout.splitlines()


def test_who_sets_mallocs_threshold_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4194304")
    assert not keep_freed_memory(torch.device("cpu"))


def test_memory_of_gpus_is_left_to_their_allocator() -> None:
    assert not keep_freed_memory(torch.device("cuda", 0))


def test_peak_counts_what_a_tensor_took() -> None:
    before = peak_bytes(torch.device("cpu"))
    taken = torch.ones(before // 4 + 2**24)
    assert peak_bytes(torch.device("cpu")) >= taken.numel() * 4


needs_clear_refs = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux's /proc"
)


@needs_clear_refs
def test_a_forgotten_peak_leaves_what_is_in_use_and_what_comes() -> None:
    cpu, mib = torch.device("cpu"), 2**20
    kept, freed = torch.ones(25 * mib), torch.ones(100 * mib)  # 100 and 400 MiB
    before = peak_bytes(cpu)
    del freed
    assert forget_peak(cpu)
    in_use = peak_bytes(cpu)
    assert kept.numel() * 4 < in_use < before - 350 * mib
    torch.ones(50 * mib)
    assert in_use + 190 * mib < peak_bytes(cpu) < before


@needs_clear_refs
def test_a_peak_is_not_that_of_the_process_that_started_it() -> None:
    program = "import torch; from lgpt.engine.memory import peak_bytes\n"
    program += "print(peak_bytes(torch.device('cpu')))"
    large = torch.ones(250 * 2**20)  # 1,000 MiB
    (peak,) = _lines_of(program)
    assert int(peak) < large.numel() * 4


def test_where_there_is_no_proc_a_peak_cannot_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *_: object) -> None:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "write_text", refused)
    monkeypatch.setattr(Path, "read_text", refused)
    assert not forget_peak(torch.device("cpu"))
    assert peak_bytes(torch.device("cpu")) > 2**20  # as rusage tells it
