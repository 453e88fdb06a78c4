"""Ranks of a measurement: each is told who it is, and none outlives a failed one."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

from lgpt.training import bench_ranks
from lgpt.training.bench_ranks import run_ranks

TELL = "import json, os; print(json.dumps([os.environ.get(n) for n in ('RANK', 'WORLD_SIZE')]))"


def test_each_rank_is_told_its_place_and_one_alone_none(monkeypatch):
    monkeypatch.setenv("RANK", "7")  # of a launcher around the whole benchmark
    codes, outs, _ = run_ranks([sys.executable, "-c", TELL], 2)
    assert codes == [0, 0]
    assert [json.loads(out) for out in outs] == [["0", "2"], ["1", "2"]]
    assert json.loads(run_ranks([sys.executable, "-c", TELL], 1)[1][0]) == [None, None]


@pytest.mark.parametrize(("cores", "threads"), [(8, 2), (3, 1), (1, 1)])
def test_ranks_share_the_cores(monkeypatch, cores: int, threads: int):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(bench_ranks, "_cores", lambda: cores)
    tell = "import json, os; print(json.dumps(os.environ.get('OMP_NUM_THREADS')))"
    outs = run_ranks([sys.executable, "-c", tell], 4)[1]
    assert [json.loads(out) for out in outs] == [str(threads)] * 4
    assert json.loads(run_ranks([sys.executable, "-c", tell], 1)[1][0]) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert json.loads(run_ranks([sys.executable, "-c", tell], 2)[1][0]) == "5"


def test_the_cores_are_those_that_this_process_may_use():
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    program += "from lgpt.training.bench_ranks import _cores; print(_cores())"
    if hasattr(os, "sched_setaffinity"):
        assert run_ranks([sys.executable, "-c", program], 1)[1] == ["1\n"]


def test_a_failed_rank_ends_the_others_and_keeps_its_code_and_words():
    program = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': print('no room', file=sys.stderr); os.kill(os.getpid(), 9)\n"
        "time.sleep(60)"
    )
    started_at = time.monotonic()
    codes, _, errors = run_ranks([sys.executable, "-c", program], 2)
    assert codes == [0, -9]
    assert errors[1].strip() == "no room"
    assert time.monotonic() - started_at < 30
