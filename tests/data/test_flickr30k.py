"""Flickr30k from local parquet files and saved datasets in the hub's layout, made here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Optional

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lgpt.core.errors import DataError
from lgpt.data.captioned import BadImage, open_dataset
from lgpt.data.flickr30k import Flickr30kDataset
from lgpt.settings.data import DataSettings

SPLITS = ["train"] * 7 + ["val"] * 2 + ["test"]
BROKEN = 5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def _jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), 20 * number, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def _columns() -> dict[str, list[Any]]:
    """The columns of nlphuji/flickr30k; picture 5 is cut off."""
    pictures = [_jpeg(n) if n != BROKEN else _jpeg(n)[:200] for n in range(10)]
    return {
        "image": [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(pictures)],
        "caption": [[f" Caption {k}\n of picture {n} . " for k in range(5)] for n in range(10)],
        "sentids": [[str(5 * n + k) for k in range(5)] for n in range(10)],
        "split": SPLITS,
        "img_id": [str(n) for n in range(10)],
        "filename": [f"{100 + n}.jpg" for n in range(10)],
    }


def _write_parquet(folder: Path, without: Optional[str] = None) -> Path:
    """Two files in a sub folder, as the hub has them, without any Hugging Face metadata."""
    columns = {name: values for name, values in _columns().items() if name != without}
    table = pa.table(columns)
    (folder / "TEST").mkdir(parents=True)
    pq.write_table(table.slice(0, 6), folder / "TEST" / "test-00000-of-00002.parquet")
    pq.write_table(table.slice(6), folder / "TEST" / "test-00001-of-00002.parquet")
    return folder


def _save_to_disk(folder: Path, as_dict: bool) -> Path:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": [datasets.Value("string")],
            "sentids": [datasets.Value("string")],
            "split": datasets.Value("string"),
            "img_id": datasets.Value("string"),
            "filename": datasets.Value("string"),
        }
    )
    saved = datasets.Dataset.from_dict(_columns(), features=features)
    (datasets.DatasetDict({"test": saved}) if as_dict else saved).save_to_disk(str(folder))
    return folder


def _open(folder: Path, split: Any = "train") -> Flickr30kDataset:
    dataset = open_dataset(DataSettings(dataset="flickr30k", source=str(folder)), split)
    assert isinstance(dataset, Flickr30kDataset)
    return dataset


@pytest.mark.parametrize("layout", ["parquet", "dataset", "dataset_dict"])
def test_the_split_column_is_respected_in_every_layout(tmp_path: Path, layout: str):
    folder = tmp_path / "flickr"
    if layout == "parquet":
        _write_parquet(folder)
    else:
        _save_to_disk(folder, as_dict=layout == "dataset_dict")
    for split, rows in (("train", range(7)), ("val", (7, 8)), ("test", (9,))):
        dataset = _open(folder, split)
        assert [dataset.image_id(i) for i in range(len(dataset))] == [
            f"{100 + n}.jpg" for n in rows
        ]
        for index, row in enumerate(rows):
            assert dataset.captions(index) == tuple(
                f"Caption {k} of picture {row} ." for k in range(5)
            )
            if row != BROKEN:
                image = dataset.load(index)
                assert (image.mode, image.size) == ("RGB", (16, 12))
                assert abs(image.getpixel((3, 3))[0] - 20 * row) <= 1


def test_a_cut_off_photograph_is_a_bad_image_with_its_file_name(tmp_path: Path):
    with pytest.raises(BadImage, match=r"105\.jpg: "):
        _open(_write_parquet(tmp_path / "flickr")).load(BROKEN)


def test_the_fingerprint_does_not_depend_on_the_layout_but_on_the_split(tmp_path: Path):
    parquet, saved = _write_parquet(tmp_path / "a"), _save_to_disk(tmp_path / "b", as_dict=False)
    assert _open(parquet).fingerprint == _open(saved).fingerprint
    assert _open(parquet).fingerprint != _open(parquet, "val").fingerprint


def test_without_the_hub_both_offline_ways_are_told():
    with pytest.raises(DataError) as caught:
        open_dataset(DataSettings(dataset="flickr30k"), "train")
    text = str(caught.value)
    assert "nlphuji/flickr30k cannot be reached" in text
    assert "hf download nlphuji/flickr30k --repo-type dataset" in text
    assert "--revision refs/convert/parquet" in text
    assert "save_to_disk" in text
    assert "data.source" in text


def test_missing_columns_and_empty_splits_name_what_is_there(tmp_path: Path):
    with pytest.raises(DataError, match=r"lacks the column\(s\) split; its columns are \['image'"):
        _open(_write_parquet(tmp_path / "a", without="split"))
    with pytest.raises(DataError, match="no column 'image'"):
        _open(_write_parquet(tmp_path / "b", without="image"))
    folder = tmp_path / "c"
    folder.mkdir()
    with pytest.raises(DataError, match="holds no parquet files"):
        _open(folder)
    pq.write_table(pa.table(_columns()).slice(0, 3), folder / "x.parquet")
    with pytest.raises(DataError, match=r"no pictures in split 'val'.*\{'train': 3\}"):
        _open(folder, "val")
    (folder / "x.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match="cannot be read"):
        _open(folder)
    with pytest.raises(DataError, match=r"/nowhere is not a folder"):
        _open(Path("/nowhere"))
