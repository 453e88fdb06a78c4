"""`lgpt sample`: what is written where, and what is refused before anything is drawn."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from model_folders import write_model_folder
from PIL import Image

from lgpt import TextToImagePipeline
from lgpt.core.errors import SettingsError
from lgpt.sampling.draw_to_file import draw_to_file, prompts_from


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"), text_width=32)


def test_drawing_to_a_grid_or_a_folder(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lgpt"):
        draw_to_file(folder, ["a red circle", "a blue square"], tmp_path / "deep" / "grid.png")
        draw_to_file(folder, ["a red circle"], tmp_path / "many", images_per_prompt=2)
        draw_to_file(folder, [], tmp_path / "free.png", unconditional=3)
    with Image.open(tmp_path / "deep" / "grid.png") as grid:
        assert grid.width > 2 * 128
    assert [p.name for p in sorted((tmp_path / "many").iterdir())] == [
        "0000.png",
        "0001.png",
        "captions.tsv",
    ]
    assert "0001.png\ta red circle" in (tmp_path / "many" / "captions.tsv").read_text()
    assert (tmp_path / "free.png").is_file()
    assert f"Wrote 2 pictures to {tmp_path / 'many'}." in caplog.text


def test_prompts_of_a_command_line(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert prompts_from(["a fox"], lines, 0) == ["a fox", "a cat", "a dog"]
    assert prompts_from([], None, 4) == []
    with pytest.raises(SettingsError, match="nothing to draw"):
        prompts_from([], None, 0)
    with pytest.raises(SettingsError, match=r"--unconditional 4 .* but 1 prompts"):
        prompts_from(["a fox"], None, 4)
    with pytest.raises(SettingsError, match=r"nowhere\.txt does not exist"):
        prompts_from([], tmp_path / "nowhere.txt", 0)
    lines.write_bytes(b"a caf\xe9")
    with pytest.raises(SettingsError, match=r"prompts\.txt cannot be read .*text in UTF-8"):
        prompts_from([], lines, 0)


def test_a_place_that_cannot_be_written_is_found_before_drawing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextToImagePipeline, "unconditional", lambda *_: pytest.fail("it drew"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for out in ("file", "file/grid.png", "folder.png", "x" * 300):
        with pytest.raises(SettingsError, match=f"--out .*{out} cannot be written"):
            draw_to_file(folder, [], tmp_path / out, unconditional=1)
