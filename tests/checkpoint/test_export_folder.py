"""Where a conversion is staged and put: names that lead elsewhere, and names that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from lgpt.checkpoint.export_folder import PROVENANCE, staged
from lgpt.core.errors import CheckpointError


def write(out: Path, text: str, overwrite: bool = False) -> None:
    with staged(out, overwrite=overwrite) as staging:
        (staging / PROVENANCE).write_text(text)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_one_and_what_it_points_to_is_replaced_each_time(tmp_path, is_there):
    """A home folder is small: the link leads to a larger disk."""
    large, home = tmp_path / "large", tmp_path / "home"
    large.mkdir()
    home.mkdir()
    if is_there:
        (large / "model").mkdir()
    (home / "model").symlink_to(large / "model")
    for text in ("first", "second", "third"):
        write(home / "model", text, overwrite=True)
        assert (home / "model").is_symlink()
        assert (large / "model" / PROVENANCE).read_text() == text
        assert [path.name for path in (*home.iterdir(), *large.iterdir())] == ["model", "model"]


def test_the_folder_one_stands_in_is_a_place_like_any_other(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    write(Path("."), "here")
    assert (tmp_path / "model" / PROVENANCE).read_text() == "here"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_place_that_cannot_be_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="/ holds something that is no export"):
        write(Path("/"), "root")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*too long"):
        write(tmp_path / ("x" * 250), "too long")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(CheckpointError, match="circle"):
        write(tmp_path / "circle", "in a circle")
