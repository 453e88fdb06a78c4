"""The latent cache: what goes in comes out; kills, ranks and wrong fingerprints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_cache import (
    BAD,
    COUNT,
    TRANSFORM,
    build,
    build_with_ranks,
    encode_captions,
    encode_images,
    fingerprint,
)
from toy_pictures import ToyPictures

from lgpt.core.errors import DataError
from lgpt.data.latent_cache import LatentCache
from lgpt.data.latent_cache_writer import CachePlan, LatentCacheWriter
from lgpt.data.transforms import to_unit_range

GOOD = [item for item in range(COUNT) if item not in BAD]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in one go by one rank."""
    folder = tmp_path_factory.mktemp("cache") / "train"
    build(folder)
    return folder


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_token_and_embedding_comes_back(whole: Path):
    cache, toys = LatentCache.open(whole, fingerprint()), ToyPictures(COUNT)
    assert (len(cache), cache.grid, cache.crops) == (COUNT - 2, (4, 4), 2)
    rng = np.random.RandomState(0)
    places = rng.permutation(len(cache))[:200]
    crops = rng.randint(0, 2, 200)
    captions = np.array([rng.randint(cache.num_captions(int(place))) for place in places])
    batch = cache.batch(places, crops, captions)
    assert batch.text is not None
    assert batch.text_mask is not None
    assert batch.text.dtype == torch.float32
    for row, (place, crop, caption) in enumerate(zip(places, crops, captions)):
        item = GOOD[place]
        pixels = torch.from_numpy(TRANSFORM(toys.load(item), item, int(crop)))[None]
        assert torch.equal(batch.tokens[row], encode_images(to_unit_range(pixels)).flatten())
        text, mask = encode_captions([toys.captions(item)[caption]])
        assert int(batch.text_mask[row].sum()) == int(mask.sum())
        kept = batch.text[row][batch.text_mask[row]]
        torch.testing.assert_close(kept, text[0][mask[0]], rtol=2**-11, atol=0)
        assert not batch.text[row][~batch.text_mask[row]].any()
    assert batch.text_mask.sum(1).max() == batch.text.shape[1]


def test_bad_pictures_are_left_out_and_named(whole: Path):
    cache = LatentCache.open(whole)
    assert cache.manifest["bad_images"] == ["picture3", "picture300"]
    lines = [json.loads(line) for line in (whole / "images.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"picture{item}" for item in GOOD]
    with pytest.raises(DataError, match=r"(?s)picture3: trunc.*picture300: .*max_bad_images \(1\)"):
        build(whole.with_name("other"), max_bad_images=1)


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_ranks_does_not_change_a_byte(whole: Path, tmp_path: Path, world: int):
    build_with_ranks(tmp_path / "train", world)
    assert _bytes_of(tmp_path / "train") == _bytes_of(whole)


def test_a_killed_build_keeps_its_chunks_and_ends_with_the_same_bytes(whole: Path, tmp_path: Path):
    folder = tmp_path / "train"
    program = [sys.executable, str(Path(__file__).with_name("toy_cache.py")), str(folder), "0.3"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(program, env={**os.environ, "PYTHONPATH": paths})
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("parts/images_*.npz"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, "the build ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = sorted(path.name for path in folder.glob("parts/images_*.npz"))
    assert 2 <= len(kept) < 6
    assert not (folder / "manifest.json").exists()
    with pytest.raises(DataError, match="not a finished latent cache"):
        LatentCache.open(folder)
    calls: list[int] = []
    build(folder, calls=calls)
    assert sum(calls) == 2 * (COUNT - 128 * len(kept) - (1 if len(kept) < 3 else 0)), (
        "chunks redone"
    )
    assert _bytes_of(folder) == _bytes_of(whole)


def test_cut_captions_of_all_chunks_and_ranks_are_counted(whole: Path, tmp_path: Path):
    def count(captions: list[str]) -> int:
        return sum("big" in text for text in captions)

    build(tmp_path / "train", count_cut_captions=count)
    manifest = LatentCache.open(tmp_path / "train").manifest
    texts = {text for item in range(COUNT) for text in ToyPictures(COUNT).captions(item)}
    assert manifest["different_captions"] == len(texts)
    assert manifest["cut_captions"] == count(sorted(texts)) == 1
    assert LatentCache.open(whole).manifest["cut_captions"] == 0


def test_a_finished_cache_is_not_made_again(whole: Path):
    calls: list[int] = []
    build(whole, calls=calls)
    assert calls == []


def test_a_cache_of_something_else_is_refused_with_every_difference(whole: Path, tmp_path: Path):
    wanted = fingerprint()
    wanted["weights"] = "w2"
    wanted["transform"]["resolution"] = 32
    told = (
        r"(?s)transform\.resolution: cache 16, run 32.*weights: cache 'w1', run 'w2'"
        r".*rm -r .*train && lgpt prepare"
    )
    with pytest.raises(DataError, match=told):
        LatentCache.open(whole, wanted)
    with pytest.raises(DataError, match=told):
        build(whole, fingerprint=wanted)
    # Nor are chunks of another half-built cache taken.
    half = tmp_path / "train"
    (half / "parts").mkdir(parents=True)
    for number, fault in ((2, told), (0, "format: cache 0, run 2")):
        plan = {"format": number, "fingerprint": fingerprint()}
        (half / "parts" / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(DataError, match=fault):
            build(half, fingerprint=wanted)


def test_an_unconditional_run_may_read_a_cache_that_has_text(whole: Path, tmp_path: Path):
    without = {**fingerprint(), "text_encoder": "none"}
    shared = LatentCache.open(whole, without, with_text=False)
    assert len(shared) == COUNT - 2
    text_less = shared.batch(np.array([0, 5]), np.array([0, 1]), np.array([0, 0]))
    assert (text_less.text, text_less.text_mask) == (None, None)
    build(tmp_path / "train", encode_captions=None, fingerprint=without)
    cache = LatentCache.open(tmp_path / "train", without)
    batch = cache.batch(np.array([0, 5]), np.array([0, 1]), np.array([0, 0]))
    assert (batch.tokens.shape, batch.text, batch.text_mask) == ((2, 16), None, None)
    with pytest.raises(DataError, match="text_encoder: cache 'none', run 't1'"):
        LatentCache.open(tmp_path / "train", fingerprint())


def test_a_file_cut_short_is_refused(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "train")
    tokens = tmp_path / "train" / "tokens.bin"
    size = tokens.stat().st_size
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=f"damaged: {size} bytes in its manifest, {size - 2}"):
        LatentCache.open(tmp_path / "train")


@pytest.mark.parametrize("left", ["", '{"format": 1, "fi', "[1, 2]"])
def test_a_damaged_manifest_is_refused(whole: Path, tmp_path: Path, left: str):
    (shutil.copytree(whole, tmp_path / "train") / "manifest.json").write_text(left)
    with pytest.raises(DataError, match=r"manifest\.json is damaged: .*lgpt prepare"):
        LatentCache.open(tmp_path / "train")


def test_bfloat16_keeps_its_eight_bits_and_float16_refuses_what_it_cannot_hold(tmp_path: Path):
    def large(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        text, mask = encode_captions(captions)
        return text * 1e4, mask

    with pytest.raises(DataError, match=r"float16.*text\.cache_dtype=bfloat16"):
        build(tmp_path / "half", encode_captions=large)
    build(tmp_path / "train", encode_captions=large, text_dtype="bfloat16")
    batch = LatentCache.open(tmp_path / "train").batch(*np.array([[2, 1, 0]]).T)
    text, _ = large([ToyPictures(COUNT).captions(2)[0]])
    torch.testing.assert_close(batch.text, text[:, :2], rtol=2**-8, atol=0)


def test_token_statistics_match_a_count_in_plain_python(whole: Path):
    cache = LatentCache.open(whole)
    items = np.arange(len(cache)).repeat(2)
    tokens = cache.batch(items, np.arange(len(items)) % 2, np.zeros(len(items), int)).tokens
    counts = torch.unique(tokens, return_counts=True)[1].double()
    shares = counts / counts.sum()
    found = cache.token_statistics()
    assert found.tokens == tokens.numel()
    assert found.used_codes == len(counts)
    assert found.usage == pytest.approx(len(counts) / 300)
    assert found.entropy == pytest.approx(float(-(shares * shares.log()).sum()))


def test_a_caption_of_20_tokens_takes_at_most_40_kb_at_width_512(tmp_path: Path):
    def clip_like(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        # As CLIP gives them: the batch padded, and a mask that ends with the text.
        text, mask = torch.randn(len(captions), 30, 512), torch.zeros(len(captions), 30)
        mask[:, :20] = 1
        return text, mask.bool()

    build(tmp_path / "train", encode_captions=clip_like)
    manifest = LatentCache.open(tmp_path / "train").manifest
    text_files = ("embeddings.bin", "embedding_offsets.npy", "caption_rows.npy")
    size = sum(manifest["files"][name] for name in text_files)
    assert 20_480 <= size / manifest["different_captions"] <= 20_700 < 40_000


def _write_large_cache(folder: Path) -> None:
    """31,000 pictures, 155,000 captions of 17 words at width 512: 2.7 GB, but zeros are a hole."""
    pictures, words, width = 31_000, 17, 512
    plan = CachePlan(
        fingerprint={},
        dataset="toy",
        split="train",
        items=pictures,
        crops=4,
        grid=(16, 16),
        codebook_size=16384,
        downsample_factor=16,
        different_captions=5 * pictures,
        text_dtype="float16",
    )
    writer = LatentCacheWriter(folder, plan, rank=0, world=1)
    for chunk in writer.begin(lambda: None):
        size = chunk.stop - chunk.first
        if chunk.kind == "images":
            writer.write_chunk(
                chunk,
                tokens=np.zeros((size, 4, 256), np.uint16),
                items=np.arange(chunk.first, chunk.stop),
                bad_items=np.zeros(0, np.int64),
                bad_reasons=np.zeros(0, np.str_),
            )
        else:
            writer.write_chunk(
                chunk,
                embeddings=np.zeros((size * words, 1), np.int16),
                lengths=np.full(size, words),
                cut=np.array(0),
            )
    captions = [tuple(f"{n} {k}" for k in range(5)) for n in range(pictures)]
    writer.finish([str(n) for n in range(pictures)], captions)
    writer.remove_parts()
    # Written one number wide; the same file 512 wide, without taking room on the disk.
    size = 5 * pictures * words * width * 2
    os.truncate(folder / "embeddings.bin", 0)
    os.truncate(folder / "embeddings.bin", size)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["text_width"] = width
    manifest["files"]["embeddings.bin"] = size
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_cache_of_155_000_captions_is_opened_without_being_read(tmp_path: Path):
    _write_large_cache(tmp_path / "train")
    program = """
import resource, sys, time
import numpy as np
from lgpt.data.latent_cache import LatentCache
from lgpt.data.latent_cache_writer import CachePlan, LatentCacheWriter
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def of_its_own():  # without pages of files, which the system takes back when it needs them
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
before, started_at = resident(), time.perf_counter()
cache = LatentCache.open(sys.argv[1])
seconds, opened = time.perf_counter() - started_at, resident() - before
own = of_its_own()
rng = np.random.RandomState(0)
started_at = time.perf_counter()
for _ in range(50):
    items = rng.randint(0, len(cache), 64)
    batch = cache.batch(items, rng.randint(0, 4, 64), rng.randint(0, 5, 64))
assert batch.text.shape == (64, 17, 512), batch.text.shape
images_a_second = 50 * 64 / (time.perf_counter() - started_at)
print(len(cache), opened, of_its_own() - own, seconds, images_a_second)
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "train")],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pictures, opened, reading, *measured = map(float, done.stdout.split())
    assert pictures == 31_000
    assert opened < 50e6, "it may take 200 MB"
    assert reading < 50e6
    # How fast it went depends on the machine: told, not tested.
    text = "opened in {:.3f} s, + {:.1f} MB; then {:.0f} images/s in random batches, + {:.1f} MB"
    print(text.format(measured[0], opened / 1e6, measured[1], reading / 1e6))
