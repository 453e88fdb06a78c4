"""Progress: lines in a log, a bar on a terminal, silence on other ranks."""

from __future__ import annotations

import logging
import sys

import pytest

from lgpt.data import progress as module
from lgpt.data.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[float]:
    """What time it is, to be set; log lines are caught."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(logging.getLogger("lgpt"), "propagate", True)
    caplog.set_level(logging.INFO, "lgpt")
    return now


def test_a_log_gets_a_line_in_between_and_one_at_the_end(
    clock: list[float], caplog: pytest.LogCaptureFixture
):
    with progress("toys to tokens", 80, unit="pictures", is_shown=True) as advance:
        for _ in range(8):
            clock[0] += 10
            advance(10)
    assert caplog.messages == [
        "toys to tokens: 30 of 80 pictures, 1.0/s, 50 s left",
        "toys to tokens: 60 of 80 pictures, 1.0/s, 20 s left",
        "toys to tokens: 80 of 80 pictures, 1.0/s, 80 s",
    ]


def test_slow_units_are_told_in_seconds(clock: list[float], caplog: pytest.LogCaptureFixture):
    with progress("bench", 2, unit="rounds", is_shown=True) as advance:
        for _ in range(2):
            clock[0] += 42.5
            advance(1)
    assert caplog.messages == [
        "bench: 1 of 2 rounds, 42.5 s each, 42 s left",
        "bench: 2 of 2 rounds, 42.5 s each, 85 s",
    ]


def test_a_terminal_gets_a_bar_and_other_ranks_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("toys", 4, unit="pictures", is_shown=False) as advance:
        advance(4)
    assert capsys.readouterr().err == ""
    with progress("toys", 4, unit="pictures", is_shown=True) as advance:
        advance(4)
    assert "toys: 100%" in capsys.readouterr().err
