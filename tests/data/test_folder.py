"""One's own pictures: captions.jsonl, imagefolder, splits, and what wrong lines are told."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lgpt.core.errors import DataError
from lgpt.data.captioned import BadImage, CaptionedDataset, open_dataset
from lgpt.settings.data import DataSettings


def _picture(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), level, np.uint8)).save(path)


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _open(folder: Path, split: Any = "train") -> CaptionedDataset:
    return open_dataset(DataSettings(dataset="folder", source=str(folder)), split)


def test_captions_jsonl_with_all_ways_to_write_a_line(tmp_path: Path):
    for name in ("b/1.png", "2.png", "3.png"):
        _picture(tmp_path / name, level=len(name))
    rows = [
        {"file_name": "b/1.png", "caption": "a red apple"},
        {"image": "2.png", "captions": ["a cat", "eine Käse-Katze"], "split": "validation"},
        {"file_name": "3.png", "text": "a dog", "split": "test"},
    ]
    _lines(tmp_path / "captions.jsonl", rows)
    seen = {}
    for split in ("train", "val", "test"):
        [index] = range(len(_open(tmp_path, split)))
        dataset = _open(tmp_path, split)
        seen[split] = (dataset.image_id(index), dataset.captions(index))
        assert dataset.load(index).getpixel((0, 0))[0] == len(dataset.image_id(index))
    assert seen == {
        "train": ("b/1.png", ("a red apple",)),
        "val": ("2.png", ("a cat", "eine Käse-Katze")),
        "test": ("3.png", ("a dog",)),
    }


def test_imagefolder_with_metadata_csv_in_split_folders(tmp_path: Path):
    for split, count in (("train", 3), ("validation", 2)):
        for number in range(count):
            _picture(tmp_path / split / f"{number}.png")
        with (tmp_path / split / "metadata.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["file_name", "text"])
            writer.writerows(
                [f"{n}.png", f'{split} "{n}", quoted\nand broken'] for n in range(count)
            )
    train, val = _open(tmp_path, "train"), _open(tmp_path, "val")
    assert (len(train), len(val)) == (3, 2)
    assert train.image_id(2) == "train/2.png"
    assert val.captions(1) == ('validation "1", quoted\nand broken',)
    assert train.load(0).size == (8, 6)


def test_imagefolder_with_one_metadata_jsonl_is_what_hugging_face_reads_too(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    for number in range(4):
        _picture(tmp_path / "pictures" / f"{number}.png", level=number)
    rows = [{"file_name": f"{n}.png", "text": f"number {n}", "split": "train"} for n in range(4)]
    _lines(tmp_path / "pictures" / "metadata.jsonl", rows)
    theirs = datasets.load_dataset(
        "imagefolder",
        data_dir=str(tmp_path / "pictures"),
        split="train",
        cache_dir=str(tmp_path / "hf"),
    )
    ours = _open(tmp_path / "pictures")
    assert {ours.captions(i)[0]: ours.load(i).getpixel((0, 0)) for i in range(4)} == {
        row["text"]: row["image"].getpixel((0, 0)) for row in theirs
    }


def test_without_splits_a_hash_picks_two_percent_and_more_pictures_move_none(tmp_path: Path):
    rows = [{"file_name": f"{n}.png", "caption": "x"} for n in range(3000)]
    _lines(tmp_path / "captions.jsonl", rows[:1500])
    few = _open(tmp_path, "val")
    before = {few.image_id(i) for i in range(len(few))}
    _lines(tmp_path / "captions.jsonl", rows)
    train, val = _open(tmp_path), _open(tmp_path, "val")
    after = {val.image_id(i) for i in range(len(val))}
    assert len(train) + len(val) == 3000
    assert 35 <= len(val) <= 85  # 60 expected, standard deviation 7.7.
    assert before < after
    assert not after & {train.image_id(i) for i in range(len(train))}


def test_the_fingerprint_follows_captions_and_pictures_but_not_the_place(tmp_path: Path):
    digests = []
    for name, caption, level in (("a", "x", 0), ("b", "x", 0), ("c", "y", 0), ("d", "x", None)):
        if level is not None:
            _picture(tmp_path / name / "1.png", level)
        (tmp_path / name).mkdir(exist_ok=True)
        _lines(tmp_path / name / "captions.jsonl", [{"file_name": "1.png", "caption": caption}])
        digests.append(_open(tmp_path / name).fingerprint)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_missing_picture_is_a_bad_image(tmp_path: Path):
    _lines(tmp_path / "captions.jsonl", [{"file_name": "gone.png", "caption": "x"}])
    with pytest.raises(BadImage, match=r"gone\.png: no such file"):
        _open(tmp_path).load(0)


def test_every_wrong_line_is_told_with_its_number(tmp_path: Path):
    (tmp_path / "captions.jsonl").write_text(
        '{"file_name": "1.png"}\n\n{"caption": "x"}\nnonsense\n[1]\n'
        '{"file_name": "1.png", "caption": "x", "split": "trian"}\n'
        '{"file_name": "1.png", "captions": [1]}\n'
    )
    with pytest.raises(DataError) as caught:
        _open(tmp_path)
    text = str(caught.value)
    assert text.startswith("6 lines cannot be used")
    for place, reason in (
        (1, "no captions, caption, text"),
        (3, "no file_name or image"),
        (4, "not JSON"),
        (5, "not an object"),
        (6, "split 'trian' is none of"),
        (7, "no captions, caption, text"),
    ):
        assert any(f"jsonl:{place}: {reason}" in line for line in text.splitlines()), (place, text)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: None, "has no captions.jsonl"),
        (lambda folder: (folder / "captions.jsonl").write_text(""), "no pictures in split 'train'"),
        (
            lambda folder: [
                (folder / name).write_text("") for name in ("captions.jsonl", "metadata.csv")
            ],
            "captions.jsonl and metadata.csv; keep only one",
        ),
    ],
)
def test_folders_that_cannot_be_used_say_why(tmp_path: Path, make: Any, told: str):
    make(tmp_path)
    with pytest.raises(DataError, match=told):
        _open(tmp_path)


def test_no_source_and_no_folder_say_what_to_set(tmp_path: Path):
    with pytest.raises(DataError, match=r"data\.source=my-pictures"):
        open_dataset(DataSettings(dataset="folder"), "train")
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        _open(tmp_path / "nowhere")
