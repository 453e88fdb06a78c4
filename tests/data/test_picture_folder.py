"""Pictures of a folder by name, whatever lies beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lgpt.core.errors import DataError
from lgpt.data.captioned import BadImage, CaptionedDataset
from lgpt.data.picture_folder import PictureFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(("b.png", "a.JPG", "deep/c.webp")):
        Image.new("RGB", (5 + number, 4), (number, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_of_all_sub_folders_come_by_name(folder):
    pictures = PictureFolder(folder)
    assert isinstance(pictures, CaptionedDataset)
    assert [pictures.image_id(n) for n in range(len(pictures))] == ["a.JPG", "b.png", "deep/c.webp"]
    assert [pictures.load(n).width for n in range(3)] == [6, 5, 7]
    assert pictures.captions(1) == ("b.png",)


def test_one_picture_is_a_set_of_one_and_the_fingerprint_follows_the_files(folder):
    assert len(PictureFolder(folder / "b.png")) == 1
    before = PictureFolder(folder).fingerprint
    assert PictureFolder(folder).fingerprint == before
    (folder / "b.png").rename(folder / "bb.png")
    assert PictureFolder(folder).fingerprint != before


def test_what_holds_no_picture_is_refused_and_a_broken_one_is_bad(folder, tmp_path):
    with pytest.raises(DataError, match="nowhere is not there"):
        PictureFolder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no picture that can be read \(.png"):
        PictureFolder(tmp_path / "empty")
    (folder / "0.png").write_bytes(b"no picture")
    with pytest.raises(BadImage, match=r"0\.png"):
        PictureFolder(folder).load(0)
