"""Ranks are read from the environment, which a user can set by mistake."""

from __future__ import annotations

import pytest

from lgpt.core.distributed import is_rank_zero, local_rank, rank, world_size
from lgpt.core.errors import SettingsError


def test_started_by_hand_it_is_one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), local_rank(), world_size(), is_rank_zero()) == (0, 0, 1, True)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), world_size(), is_rank_zero()) == (3, 4, False)


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("WORLD_SIZE", "abc", world_size),
        ("WORLD_SIZE", "0", world_size),
        ("RANK", "-1", rank),
        ("LOCAL_RANK", "", local_rank),
    ],
)
def test_a_variable_that_is_no_number_is_named(name, text, read, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(SettingsError, match=f"variable {name} = '{text}' must be a whole number"):
        read()
