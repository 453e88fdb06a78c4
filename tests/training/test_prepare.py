"""`lgpt prepare` of phase 1 on a flickr30k-shaped set: kills, ranks, float32, streams, reports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flickr_set
import numpy as np
import pytest
import tiny
import torch

from lgpt.core.errors import SettingsError
from lgpt.data.captioned import open_dataset
from lgpt.data.latent_cache import LatentCache
from lgpt.data.transforms import to_unit_range
from lgpt.models.clip_encoder import ClipTextEncoder
from lgpt.settings.phases import Phase1
from lgpt.settings.run import load_run_settings
from lgpt.training.components import load_vqvae_of, transform_of
from lgpt.training.encode_latents import image_encoder, prepare_latent_cache

FIXTURES = flickr_set.FIXTURES
TRAIN, VAL = 260, 8
STOPPED = Path(__file__).with_name("stopped_prepare.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `flickr`: 5 chunks of pictures and 2 of captions in the training split."""
    folder = tmp_path_factory.mktemp("prepare")
    texts = [f"picture number {n} of {n % 7} cats" for n in range(5 * (TRAIN + VAL))]
    splits = ["val"] * VAL + ["train"] * TRAIN + ["test"]
    flickr_set.write_parquet(folder / "flickr", splits, texts)
    return folder


def _run(home: Path, cache: str, **changes: Any) -> tuple[Phase1, Path]:
    config = flickr_set.phase1_run(home, home / "flickr", home / cache, **changes)
    path = tiny.write(home / f"{cache}.yaml", config)
    run = load_run_settings(path, environ={})
    assert isinstance(run, Phase1)
    return run, path


@pytest.fixture(scope="module")
def whole(home: Path) -> Phase1:
    """The run whose cache was made by one process in one go."""
    run, _ = _run(home, "whole")
    prepare_latent_cache(run)
    return run


def _bytes_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _start(words: list[str], world: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = str(Path(__file__).parents[2])
    common = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    if world > 1:
        common.update(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        command = [sys.executable, *(word.replace("RANK", str(rank)) for word in words)]
        ranks.append(subprocess.Popen(command, env={**common, **own}))
    return ranks


def _kill_at(place: str, config: Path, world: int) -> None:
    """SIGKILL to every rank, when all of them stand at the place."""
    mark = f"{config}.{place}.RANK"
    ranks = _start([str(STOPPED), str(config), place, mark], world)
    try:
        deadline = time.monotonic() + 300
        while not all(Path(mark.replace("RANK", str(r))).exists() for r in range(world)):
            assert all(process.poll() is None for process in ranks), "it ended before the place"
            assert time.monotonic() < deadline, f"never came to {place}"
            time.sleep(0.05)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert [process.returncode for process in ranks] == [-signal.SIGKILL] * world


@pytest.mark.slow
def test_a_preparation_killed_twice_ends_with_the_bytes_of_one_that_was_not(
    home: Path, whole: Phase1
):
    run, config = _run(home, "killed")
    assert run.latent_cache is not None
    parts = run.latent_cache / "train" / "parts"
    _kill_at("second_chunk_half_written", config, world=1)
    assert len(list(parts.glob("*.npz"))) == 1
    assert len(list(parts.glob(".*.tmp"))) == 1
    _kill_at("before_the_manifest", config, world=1)
    assert len(list(parts.glob("*.npz"))) == 5 + 2
    assert not (run.latent_cache / "train" / "manifest.json").exists()
    prepare_latent_cache(run)
    assert _bytes_of(run.latent_cache) == _bytes_of(home / "whole")


@pytest.mark.slow
def test_two_ranks_that_were_killed_end_with_the_same_bytes(home: Path, whole: Phase1):
    run, config = _run(home, "ranks")
    assert run.latent_cache is not None
    _kill_at("after_a_chunk", config, world=2)
    assert len(list((run.latent_cache / "train" / "parts").glob("*.npz"))) == 2
    ranks = _start(["-m", "lgpt", "prepare", str(config)], world=2)
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    assert _bytes_of(run.latent_cache) == _bytes_of(home / "whole")


def test_streaming_gives_the_same_latents_without_a_picture_on_the_disk(home: Path, whole: Phase1):
    config = flickr_set.phase1_run(home, home / "flickr", home / "streamed")
    del config["data"]["cache_folder"]
    config["data"]["streaming"] = True
    before = set(home.rglob("*"))
    prepare_latent_cache(load_run_settings(tiny.write(home / "s.yaml", config), environ={}))
    made = set(home.rglob("*")) - before - {home / "s.yaml"}
    assert all(path.is_relative_to(home / "streamed") for path in made)
    streamed, kept = _bytes_of(home / "streamed"), _bytes_of(home / "whole")
    assert streamed.keys() == kept.keys()
    different = {name for name in kept if streamed[name] != kept[name]}
    assert different == {"train/manifest.json", "val/manifest.json"}  # the fingerprint in it


def test_pictures_are_encoded_in_float32_whatever_training_is(home: Path, whole: Phase1):
    """The run trains in bf16, which would change tokens, of the fixture and of these pictures."""
    assert whole.training.precision == "bf16"
    cpu = torch.device("cpu")
    vqvae = load_vqvae_of(whole.vqvae)
    assert {p.dtype for p in vqvae.parameters()} == {torch.float32}
    images = torch.from_numpy(np.load(FIXTURES / "taming_tiny" / "images.npy"))
    expected = torch.from_numpy(np.load(FIXTURES / "taming_tiny" / "indices.npy"))
    assert torch.equal(image_encoder(vqvae, cpu)(images), expected.reshape(2, 4, 4))

    dataset, transform = open_dataset(whole.data, "train"), transform_of(whole.data, "train")
    cache = LatentCache.open(home / "whole" / "train")
    items, crops = np.arange(40).repeat(4), np.tile(np.arange(4), 40)
    cut = [transform(dataset.load(int(i)), int(i), int(c)) for i, c in zip(items, crops)]
    pictures = to_unit_range(torch.from_numpy(np.stack(cut)))
    tokens = cache.batch(items, crops, np.zeros_like(items)).tokens
    assert torch.equal(tokens, vqvae.encode(pictures).flatten(1))
    halved = vqvae.bfloat16()
    # How many is in test_vqgan_import.py.
    assert (halved.encode(images).flatten() != expected.flatten()).any()
    assert (halved.encode(pictures).flatten(1) != tokens).any()


def test_a_cache_that_cannot_be_made_is_refused_before_anything_is_read(tmp_path: Path):
    config = flickr_set.phase1_run(tmp_path, tmp_path / "nowhere", tmp_path / "file" / "cache")
    (tmp_path / "file").write_text("mine")
    run = load_run_settings(tiny.write(tmp_path / "run.yaml", config), environ={})
    assert isinstance(run, Phase1)
    with pytest.raises(SettingsError, match=r"latent_cache .*file/cache cannot be made: .*Give it"):
        prepare_latent_cache(run)


@pytest.mark.parametrize(("dtype", "largest_rms"), [("float16", 2.5e-4), ("bfloat16", 2e-3)])
def test_the_report_and_what_the_half_types_lose_of_clip_tiny(
    tmp_path: Path, dtype: str, largest_rms: float, capsys: pytest.CaptureFixture[str]
):
    """Captions are the fixture's: empty, not ASCII, and one beyond 77 tokens."""
    texts = json.loads((FIXTURES / "clip_tiny" / "texts.json").read_text())
    flickr = flickr_set.write_parquet(tmp_path / "flickr", ["train"] * 8 + ["val"], texts)
    config = flickr_set.phase1_run(tmp_path, flickr, tmp_path / "cache")
    config["text"]["cache_dtype"] = dtype
    run = load_run_settings(tiny.write(tmp_path / "run.yaml", config), environ={})
    report = prepare_latent_cache(run)[0]
    facts = {
        "split": "train",
        "pictures": 8,
        "crops": 4,
        "bad_images": 0,
        "tokens": 8 * 4 * 4,
        "different_captions": 8,
        "cut_captions": 1,
        "text_dtype": dtype,
    }
    assert {key: report[key] for key in facts} == facts
    assert report["usage"] == report["used_codes"] / 64
    assert 0 < report["entropy"] <= report["largest_entropy"] == np.log(64)

    cache, dataset = LatentCache.open(tmp_path / "cache" / "train"), open_dataset(run.data, "train")
    encoder = ClipTextEncoder.from_pretrained(FIXTURES / "clip_tiny")
    items, captions = np.arange(8).repeat(5), np.tile(np.arange(5), 8)
    kept = cache.batch(items, np.zeros_like(items), captions)
    assert kept.text is not None
    assert kept.text_mask is not None
    exact, mask = encoder.encode([dataset.captions(int(i))[k] for i, k in zip(items, captions)])
    assert torch.equal(kept.text_mask, mask)
    loss = (kept.text - exact)[mask].pow(2).mean().sqrt() / exact[mask].pow(2).mean().sqrt()
    assert 0 < float(loss) < largest_rms
