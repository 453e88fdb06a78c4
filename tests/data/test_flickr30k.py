"""Flickr30k by every way there is, from a small set in the hub's layout that is made here."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lgpt.core.errors import DataError
from lgpt.data import flickr30k_datasets, flickr30k_stream
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


def _write_original(folder: Path, with_splits: bool) -> Path:
    """The authors' layout: captions beside pictures, which lie a level deeper, as in their tar."""
    columns = _columns()
    pictures = folder / "flickr30k-images" / "flickr30k-images"
    pictures.mkdir(parents=True)
    for name, image in zip(columns["filename"], columns["image"]):
        (pictures / name).write_bytes(image["bytes"])
    lines = [
        f"{name}#{k}\t{text.strip()}"
        for name, texts in zip(columns["filename"], columns["caption"])
        for k, text in enumerate(" ".join(t.split()) for t in texts)
    ]
    (folder / "results_20130124.token").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if with_splits:
        names = ("filename", "caption", "split")
        images = [
            {"filename": name, "sentences": [{"raw": t} for t in texts], "split": split}
            for name, texts, split in zip(*(columns[name] for name in names))
        ]
        text = json.dumps({"images": images, "dataset": "flickr30k"})
        (folder / "dataset_flickr30k.json").write_text(text, encoding="utf-8")
    return folder


class _HubOfFolders:
    """Stands in for HfFileSystem: datasets/NAME@REVISION/... is a folder here."""

    root = Path()

    def _local(self, path: str) -> Path:
        start = "datasets/nlphuji/flickr30k@refs%2Fconvert%2Fparquet"
        assert path.startswith(start), path
        return self.root / path[len(start) :].lstrip("/")

    def glob(self, pattern: str) -> list[str]:
        start = pattern[: pattern.index("/**")]
        files = self._local(start).rglob("*.parquet")
        return [f"{start}/{path.relative_to(self.root).as_posix()}" for path in files]

    def info(self, path: str) -> dict[str, Any]:
        return {"size": self._local(path).stat().st_size}

    def open(self, path: str, mode: str, cache_type: str) -> Any:
        return io.BytesIO(self._local(path).read_bytes())


WAYS = ["hub", "hub_streamed", "parquet", "parquet_streamed", "dataset", "dataset_dict", "original"]


def _settings(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> DataSettings:
    """The set laid out for one of WAYS, and the settings that read it."""
    source: Optional[str] = str(folder)
    if way in ("dataset", "dataset_dict"):
        _save_to_disk(folder, as_dict=way == "dataset_dict")
    elif way == "original":
        _write_original(folder, with_splits=True)
    else:
        _write_parquet(folder)
    if way == "hub":
        monkeypatch.setattr(flickr30k_datasets, "hub_folder", lambda name, **place: folder)
    if way == "hub_streamed":
        monkeypatch.setattr(_HubOfFolders, "root", folder)
        monkeypatch.setattr(huggingface_hub, "HfFileSystem", _HubOfFolders)
    if way.startswith("hub"):
        source = None
    return DataSettings(dataset="flickr30k", source=source, streaming=way.endswith("streamed"))


def _open(folder: Path, split: Any = "train", **settings: Any) -> Flickr30kDataset:
    data = DataSettings(dataset="flickr30k", source=str(folder), **settings)
    dataset = open_dataset(data, split)
    assert isinstance(dataset, Flickr30kDataset)
    return dataset


@pytest.mark.parametrize("way", WAYS)
def test_the_split_column_is_respected_by_every_way(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
):
    settings = _settings(way, tmp_path / "flickr", monkeypatch)
    splits: tuple[tuple[Any, Any], ...] = (("train", range(7)), ("val", (7, 8)), ("test", (9,)))
    for split, rows in splits:
        dataset = open_dataset(settings, split)
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
            else:
                with pytest.raises(BadImage, match=r"105\.jpg: "):
                    dataset.load(index)


def test_the_fingerprint_is_one_for_all_ways_that_know_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = {}
    for way in WAYS:
        settings = _settings(way, tmp_path / way, monkeypatch)
        found[way] = open_dataset(settings, "train").fingerprint
        assert open_dataset(settings, "val").fingerprint != found[way]
    # A stream knows the files' sizes, not the pictures'.
    assert found["hub_streamed"] == found["parquet_streamed"]
    assert len(set(found.values())) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_without_the_hub_all_offline_ways_are_told(streaming: bool):
    with pytest.raises(DataError) as caught:
        open_dataset(DataSettings(dataset="flickr30k", streaming=streaming), "train")
    text = str(caught.value)
    told = "cannot be streamed" if streaming else "cannot be reached"
    assert f"nlphuji/flickr30k {told}: Cannot reach" in text
    assert "results_20130124.token" in text
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
    with pytest.raises(DataError, match=r"x\.parquet cannot be read"):
        _open(folder, streaming=True)
    saved = _save_to_disk(tmp_path / "d", as_dict=False)
    (saved / "state.json").write_text("{")
    with pytest.raises(DataError, match="written by save_to_disk but cannot be read"):
        _open(saved)


def test_the_real_hub_client_streams_and_downloads_the_same_from_a_server(tmp_path: Path):
    """Its grammar of paths and revisions, and that captions are fetched without the pictures."""
    rng, rows = np.random.RandomState(0), 150
    columns = {
        "image": [{"bytes": _noise(rng), "path": f"{n}.jpg"} for n in range(rows)],
        "caption": [[f"caption {k} of {n}" for k in range(5)] for n in range(rows)],
        "split": ["train"] * (rows - 20) + ["test"] * 20,
        "filename": [f"{n}.jpg" for n in range(rows)],
    }
    folder = tmp_path / "hub" / "TEST" / "test"
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "0000.parquet", row_group_size=25)
    (tmp_path / "hub" / "README.md").write_text("not wanted")
    program = [str(Path(__file__).with_name("hub_server.py"))]
    done = subprocess.run(
        [sys.executable, *program, str(tmp_path / "hub"), str(tmp_path / "cache")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    streamed, downloaded = found["streamed"], found["downloaded"]
    for facts in ("ids", "captions", "pixels"):
        assert streamed[facts] == downloaded[facts]
    assert len(streamed["ids"]) == rows - 20
    size = (folder / "0000.parquet").stat().st_size
    assert streamed["bytes_for_captions"] < size / 5
    assert streamed["bytes"] < 1.1 * size
    kept = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert "0000.parquet" in kept
    assert "README.md" not in kept


def _noise(rng: np.random.RandomState) -> bytes:
    buffer = io.BytesIO()
    pixels = rng.randint(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_downloads_and_arrow_files_go_into_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flickr, cache = _write_parquet(tmp_path / "flickr"), tmp_path / "cache"
    asked: list[dict[str, Any]] = []

    def download(name: str, **place: Any) -> Path:
        asked.append({"name": name, **place, "choose": place["choose"](["a.parquet", "README.md"])})
        return flickr

    monkeypatch.setattr(flickr30k_datasets, "hub_folder", download)
    open_dataset(DataSettings(dataset="flickr30k", cache_folder=cache), "train")
    assert asked == [
        {
            "name": "nlphuji/flickr30k",
            "repo_type": "dataset",
            "revision": "refs/convert/parquet",
            "choose": ["a.parquet"],
            "cache_folder": cache / "hub",
        }
    ]
    assert list((cache / "datasets").rglob("*.arrow"))
    assert not (tmp_path / "hf").exists(), "something was written to the default cache"


def test_streaming_writes_nothing_and_reads_every_row_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "flickr").mkdir()
    pq.write_table(pa.table(_columns()), tmp_path / "flickr" / "a.parquet", row_group_size=2)
    reads: list[int] = []
    read = pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, group: int, **wanted: Any) -> pa.Table:
        reads.append(group)
        return read(file, group, **wanted)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    before = sorted(tmp_path.rglob("*"))
    dataset = _open(tmp_path / "flickr", streaming=True)
    assert reads == [], "no picture is read for captions and splits"
    good = [index for index in range(7) if index != BROKEN]
    in_order = [dataset.load(index).tobytes() for index in good]
    assert reads == [0, 1, 2, 3]
    assert sorted(tmp_path.rglob("*")) == before
    with ThreadPoolExecutor(3) as pool:
        assert [image.tobytes() for image in pool.map(dataset.load, good)] == in_order


def test_what_cannot_be_streamed_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved = _save_to_disk(tmp_path / "saved", as_dict=False)
    with pytest.raises(DataError, match=r"reads parquet files and .* has none; leave data\.stream"):
        _open(saved, streaming=True)
    with pytest.raises(DataError, match="no column 'image'"):
        _open(_write_parquet(tmp_path / "bare", without="image"), streaming=True)
    with pytest.raises(DataError, match=r"lacks the column\(s\) split; its columns are \['image'"):
        _open(_write_parquet(tmp_path / "splitless", without="split"), streaming=True)
    (tmp_path / "plain").mkdir()
    columns = {**_columns(), "image": [b"x"] * 10}
    pq.write_table(pa.table(columns), tmp_path / "plain" / "a.parquet")
    with pytest.raises(DataError, match="has no field 'bytes'"):
        _open(tmp_path / "plain", streaming=True)
    flickr = _write_parquet(tmp_path / "flickr")
    monkeypatch.setattr(flickr30k_stream, "LARGEST_GROUP_BYTES", 500)
    with pytest.raises(DataError, match=r"MB of pictures, and .*row_group_size=100"):
        _open(flickr, streaming=True)


def test_a_stream_that_breaks_off_says_that_the_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = _open(_write_parquet(tmp_path / "flickr"), streaming=True)

    def broken(file: pq.ParquetFile, group: int, **wanted: Any) -> pa.Table:
        raise ConnectionResetError("the line is dead")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", broken)
    with pytest.raises(DataError, match=r"test-00000-of.*row group 0: the line is dead\. The same"):
        dataset.load(0)
    monkeypatch.setattr(pq.ParquetFile, "read", broken)
    with pytest.raises(DataError, match=r"captions of .* cannot be read"):
        _open(tmp_path / "flickr", streaming=True)


def test_without_a_split_file_the_token_layout_is_split_by_hash_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lines = [f"{n}.jpg#{k}\tcaption {k}" for n in range(4000) for k in range(5)]
    (tmp_path / "results_20130124.token").write_text("\n".join(lines))
    (tmp_path / "0.jpg").write_bytes(_jpeg(1))
    with caplog.at_level("WARNING", logger="lgpt"):
        parts = {split: _open(tmp_path, split) for split in ("train", "val", "test")}
    assert "not the published ones" in caplog.text
    ids = {split: {d.image_id(i) for i in range(len(d))} for split, d in parts.items()}
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 4000
    for split in ("val", "test"):
        assert 4000 / 31 * 0.7 < len(ids[split]) < 4000 / 31 * 1.3
    item = next(i for i in range(len(parts["val"])) if parts["val"].image_id(i) != "0.jpg")
    with pytest.raises(BadImage, match="no such file"):
        parts["val"].load(item)


def test_original_files_that_cannot_be_used_are_named(tmp_path: Path):
    folder = _write_original(tmp_path / "flickr", with_splits=False)
    token = folder / "results_20130124.token"
    token.write_text("1.jpg#0\ta dog\n1.jpg a cat\n\n#1\tx\n")
    with pytest.raises(DataError, match=r"(?s)2 line\(s\).*token:2: not NAME.*a cat.*token:4: "):
        _open(folder)
    token.write_text("\n")
    with pytest.raises(DataError, match="it is empty"):
        _open(folder)
    token.write_text("1.jpg#0\ta dog\n")
    with pytest.raises(DataError, match=r"holds the pictures, such as 1\.jpg"):
        _open(folder)
    (folder / "dataset_flickr30k.json").write_text('{"images": [{"filename": "1.jpg"}]}')
    with pytest.raises(DataError, match=r"not Karpathy's .*KeyError: 'split'"):
        _open(folder)
