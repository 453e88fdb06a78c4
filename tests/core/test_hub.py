"""The hub stood in for by servers of our own: one that is silent, one that gives files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from lgpt.core.errors import CheckpointError
from lgpt.core.hub import ANSWER_SECONDS, hub_folder


def test_a_hub_that_takes_the_connection_and_says_nothing_is_given_up_on(beside_a_silent_hub):
    program = """
import sys
from lgpt.core.hub import hub_folder
try:
    hub_folder("nobody/nothing", repo_type="dataset", choose=lambda files: files)
except ConnectionError as error:
    print(error)
"""
    # Without a deadline it waits for ever.
    done = beside_a_silent_hub(program, timeout=20 * ANSWER_SECONDS)
    assert done.stdout.strip(), done.stderr
    assert "Traceback" not in done.stderr


def test_offline_the_reason_comes_at_once_and_a_cached_repository_is_read_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(ConnectionError, match="offline mode is enabled"):
        hub_folder("nobody/nothing", repo_type="model", choose=list, cache_folder=tmp_path)
    commit = "0" * 40
    repository = tmp_path / "models--some--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    with caplog.at_level(logging.INFO, logger="lgpt"):
        found = hub_folder("some/clip", repo_type="model", choose=list, cache_folder=tmp_path)
    assert f"some/clip is read from the hub cache, {found}: " in caplog.text
    assert [path.name for path in found.iterdir()] == ["config.json"]


def test_only_the_chosen_files_of_the_asked_revision_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fetched: list[dict[str, Any]] = []
    siblings = [SimpleNamespace(rfilename=name) for name in ("a.parquet", "b.txt")]

    class Hub:
        def repo_info(self, name: str, **asked: Any) -> SimpleNamespace:
            assert asked == {"repo_type": "dataset", "revision": "r1", "timeout": ANSWER_SECONDS}
            return SimpleNamespace(siblings=siblings)

    def fetch(name: str, **wanted: Any) -> str:
        fetched.append(wanted)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    folder = hub_folder(
        "some/set",
        repo_type="dataset",
        revision="r1",
        choose=lambda files: [name for name in files if name.endswith(".parquet")],
        cache_folder=tmp_path,
    )
    assert folder == tmp_path
    assert fetched == [
        {
            "allow_patterns": ["a.parquet"],
            "local_files_only": False,
            "repo_type": "dataset",
            "revision": "r1",
            "cache_dir": str(tmp_path),
        }
    ]


def test_what_choosing_raises_comes_through_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
):
    class Hub:
        def repo_info(self, name: str, **asked: Any) -> SimpleNamespace:
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename="README.md")])

    def choose(files: Sequence[str]) -> Sequence[str]:
        raise CheckpointError(f"only {', '.join(files)} is there")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match=r"only README\.md is there"):
        hub_folder("some/set", repo_type="model", choose=choose)
