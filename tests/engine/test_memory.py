"""What a process keeps of the memory it has freed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lgpt.engine.memory import keep_freed_memory, peak_bytes

_FAULTS_OF_LATER_STEPS = """
import resource, statistics, sys
import torch
from lgpt.engine.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory(torch.device("cpu"))
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(mebi << 20) for mebi in (1, 8, 3, 12, 2)]
    sum(float((tensor * 2).sum()) for tensor in kept)
    del kept
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults[4:])))  # now and then a step finds its room torn
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_tensors_are_not_mapped_again() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", _FAULTS_OF_LATER_STEPS, mode]
        return int(subprocess.run(command, capture_output=True, check=True, timeout=300).stdout)

    pages = 26 * 2**22 // 4096
    assert faults("plain") > pages
    assert faults("keep") < pages / 10


def test_memory_of_gpus_is_left_to_their_allocator() -> None:
    assert not keep_freed_memory(torch.device("cuda", 0))


def test_peak_counts_what_a_tensor_took() -> None:
    before = peak_bytes(torch.device("cpu"))
    taken = torch.ones(before // 4 + 2**24)
    assert peak_bytes(torch.device("cpu")) >= taken.numel() * 4
