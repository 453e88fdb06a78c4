"""checkpoint.resume=ask on a real terminal: the question, its answers, and Ctrl-D."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from lgpt.core.errors import SettingsError
from lgpt.settings.phases import RunSettings
from lgpt.settings.run import load_run_settings
from lgpt.training.resume import _choice


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """What is written to it is typed on the terminal that stdin is."""
    leader, follower = os.openpty()
    with os.fdopen(follower) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        yield leader
    os.close(leader)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[RunSettings, RunSettings]:
    """The run as its config says now, and as it was saved: another learning rate."""
    path = tiny.write(tmp_path / "run.yaml", tiny.vqvae_run(tmp_path, 8))
    saved = load_run_settings(path, ["optimizer.learning_rate=0.5"], environ={})
    now = load_run_settings(path, ["checkpoint.resume=ask"], environ={})
    return now, saved


@pytest.mark.parametrize("answer", ["config", "checkpoint"])
def test_the_question_is_put_again_until_the_answer_is_one_of_the_two(
    answer, keyboard, pair, capsys
):
    os.write(keyboard, f"perhaps\n{answer}\n".encode())
    assert _choice(*pair, Path("step_4")) == answer
    shown = capsys.readouterr()
    assert shown.out.count("of the config or of the checkpoint?") == 2
    assert "optimizer.learning_rate" in shown.err
    assert "0.5" in shown.err


def test_nothing_is_asked_where_nothing_differs(keyboard, pair):
    now, _ = pair
    assert _choice(now, now, Path("step_4")) == "config"


def test_a_terminal_that_is_closed_is_a_sentence(keyboard, pair):
    os.write(keyboard, b"\x04")
    with pytest.raises(SettingsError, match=r"closed without an answer: give checkpoint.resume="):
        _choice(*pair, Path("step_4"))
