"""`lgpt sample`: what is written where, and what is refused before anything is drawn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from model_folders import write_model_folder
from PIL import Image
from tiny_clip import write_tiny_clip
from torch import Tensor

from lgpt import TextToImagePipeline
from lgpt.core.errors import SettingsError
from lgpt.sampling.draw_to_file import Choices, draw_to_file, prompts_from
from lgpt.sampling.generate import generate_tokens


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
    monkeypatch.setattr(
        TextToImagePipeline, "unconditional", lambda *_, **__: pytest.fail("it drew")
    )
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for out in ("file", "file/grid.png", "folder.png", "x" * 300):
        with pytest.raises(SettingsError, match=f"--out .*{out} cannot be written"):
            draw_to_file(folder, [], tmp_path / out, unconditional=1)


def test_best_pictures_carry_their_scores(folder: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    write_tiny_clip(clip)
    ask = {"images_per_prompt": 3, "best": 2, "clip": str(clip)}
    draw_to_file(folder, ["a red circle", "a blue square"], tmp_path / "many", **ask)
    lines = [line.split("\t") for line in (tmp_path / "many/captions.tsv").read_text().splitlines()]
    assert [line[:2] for line in lines] == [
        ["0000.png", "a red circle"],
        ["0001.png", "a red circle"],
        ["0002.png", "a blue square"],
        ["0003.png", "a blue square"],
    ]
    scores = [float(line[2]) for line in lines]
    assert scores[0] >= scores[1]
    assert scores[2] >= scores[3]
    draw_to_file(folder, ["a red circle"], tmp_path / "grid.png", **ask)
    assert (tmp_path / "grid.png").is_file()


def test_a_picture_is_completed_and_previews_are_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (30, 20), 90).save(tmp_path / "half.png")
    given: list[Tensor] = []

    def watched(*words: Any, **choices: Any) -> Tensor:
        given.append(choices["given"])
        return generate_tokens(*words, **choices)

    monkeypatch.setattr("lgpt.sampling.pipeline.generate_tokens", watched)
    ask = {"complete": tmp_path / "half.png", "preview": tmp_path / "early.png"}
    draw_to_file(folder, ["a red circle"], tmp_path / "out.png", keep=0.25, **ask)
    draw_to_file(folder, [], tmp_path / "free.png", unconditional=2, **ask)
    assert [tokens.shape for tokens in given] == [(1, 4), (2, 8)]
    with Image.open(tmp_path / "early.png") as early, Image.open(tmp_path / "free.png") as free:
        assert early.width == free.width
    assert not list(tmp_path.glob(".*"))


def test_choices_that_do_not_go_together_are_refused_before_anything_is_opened(
    tmp_path: Path,
) -> None:
    nowhere, out = tmp_path / "nowhere", tmp_path / "a.png"
    with pytest.raises(SettingsError, match="--clip x has no effect without --best"):
        draw_to_file(nowhere, ["a"], out, clip="x")
    with pytest.raises(SettingsError, match=r"--keep 0\.25 has no effect without --complete"):
        draw_to_file(nowhere, ["a"], out, keep=0.25)
    with pytest.raises(
        SettingsError, match=r"--guidance 2\.0, --best 1 has no effect with --uncon"
    ):
        draw_to_file(nowhere, [], out, unconditional=1, choices=Choices(guidance=2.0), best=1)


def test_what_cannot_be_completed_or_previewed_is_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    for broken in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(SettingsError, match=rf"--complete {broken} is no picture"):
            draw_to_file(folder, ["a"], out, complete=broken)
    with pytest.raises(SettingsError, match=r"--preview early\.jpg must end in \.png"):
        draw_to_file(folder, ["a"], out, preview=Path("early.jpg"))
