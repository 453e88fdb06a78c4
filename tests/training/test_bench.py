"""Benchmarks: what they report, on tiny models; never how fast anything is."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from lgpt.cli import app
from lgpt.core.errors import CheckpointError, DataError, LgptError, SettingsError
from lgpt.engine.memory import forget_peak, peak_bytes
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.settings.run import load_run_settings
from lgpt.settings.vqvae import VqvaeSettings, VqvaeSourceSettings
from lgpt.training import bench_prepare as bench_prepare_module
from lgpt.training.bench_prepare import bench_prepare, expected_architecture
from lgpt.training.encode_latents import prepare_latent_cache


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = VqvaeSettings(**tiny.VQVAE)
    VQVAE(VQVAEConfig.from_settings(settings)).save_pretrained(tmp_path / "vqvae")
    return tiny.write(tmp_path / "run.yaml", tiny.transformer_run(tmp_path, 4))


def bench(*words: Any) -> dict[str, Any]:
    """`lgpt bench ... --json`: what its last line says."""
    done = CliRunner().invoke(app, ["bench", *map(str, words), "--json"])
    if done.exception is not None:
        raise done.exception
    result = json.loads(done.stdout.splitlines()[-1])
    numbers = [value for value in result.values() if isinstance(value, float)]
    assert all(math.isfinite(number) for number in numbers)
    return result


def test_prepare_is_compared_with_the_bare_encoder(config: Path, tmp_path: Path):
    result = bench("prepare", config, "--images", 6, "--rounds", 2)
    assert result["ratio"] > 0
    assert 0 < result["encoder_share"] < 1
    assert len(result["ratios"]) == result["rounds"] == 2
    assert (result["pictures"], result["crops"], result["images_per_call"]) == (6, 1, 6)
    for name in ("bare_images_per_second", "prepare_images_per_second"):
        assert result[name] > 0
    # 16 pixels, f=4
    assert result["prepare_tokens_per_second"] == 16 * result["prepare_images_per_second"]
    assert result["vqvae"] == f"custom {tmp_path / 'vqvae'}"
    assert not (tmp_path / "latents").exists(), "the run's own cache is left alone"


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux's /proc")
def test_the_peak_of_preparation_is_not_that_of_what_was_before(config: Path):
    assert forget_peak(torch.device("cpu"))
    in_use = peak_bytes(torch.device("cpu"))
    torch.ones(200 * 2**20)  # 800 MiB
    result = bench("prepare", config, "--images", 6, "--rounds", 1)
    assert 0 < result["peak_bytes"] < in_use + 700 * 2**20


def test_where_a_peak_cannot_be_had_none_is_told(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_prepare_module, "forget_peak", lambda device: False)
    result = bench("prepare", config, "--images", 6, "--rounds", 1)
    assert result["peak_bytes"] is None
    assert bench_prepare_module.prepare_table(result).row_count == 6


def test_every_crop_is_an_image_of_its_own(tmp_path: Path, config: Path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    names = [f"{number}.png" for number in range(40)]
    for name in names:
        Image.new("RGB", (20, 30)).save(pictures / name)
    lines = [json.dumps({"file_name": name, "captions": ["nothing"]}) for name in names]
    (pictures / "captions.jsonl").write_text("\n".join(lines))
    words = ["data.dataset=folder", f"data.source={pictures}", "data.crops=3", "data.flip=true"]
    result = bench("prepare", config, *words, "--images", 5, "--rounds", 1)
    assert (result["pictures"], result["crops"], result["images_per_call"]) == (5, 3, 15)


def test_no_more_pictures_are_prepared_than_there_are(config: Path):
    assert bench("prepare", config, "--images", 10**6, "--rounds", 1)["pictures"] == 48


def test_random_weights_are_taken_where_there_are_none_and_said_to_be(config: Path):
    missing = ["vqvae.checkpoint=nowhere", "vqvae.codebook_size=64", "vqvae.downsample_factor=2"]
    with pytest.raises(CheckpointError, match=r"(?s)nowhere.*--random-vqvae"):
        bench("prepare", config, *missing)
    result = bench("prepare", config, *missing, "--random-vqvae", "--images", 1, "--rounds", 1)
    assert result["vqvae"].startswith("RANDOM weights (nowhere is missing): 64 codes, f=2")


def test_a_vqvae_that_is_there_is_not_replaced_by_random_weights(config: Path):
    wrong = ["vqvae.codebook_size=64", "--random-vqvae"]
    with pytest.raises(CheckpointError, match=r"codebook_size expects 64, but .* has 32"):
        bench("prepare", config, *wrong)


@pytest.mark.parametrize(
    ("factor", "mult"), [(16, (1, 1, 2, 2, 4)), (8, (1, 2, 2, 4)), (4, (1, 2, 4)), (2, (2, 4))]
)
def test_random_weights_have_the_published_architecture(factor: int, mult: tuple[int, ...]):
    found = expected_architecture(VqvaeSourceSettings(downsample_factor=factor))
    assert (found.ch_mult, found.downsample_factor) == (mult, factor)
    assert (found.codebook_size, found.code_dim) == (16384, 256)
    if factor == 16:  # as the config that nothing was asked of: vqgan_imagenet_f16_16384
        assert found == VQVAEConfig(codebook_size=16384, code_dim=256)
    with pytest.raises(SettingsError, match=r"downsample_factor \(6\) must be a power of 2"):
        expected_architecture(VqvaeSourceSettings(downsample_factor=6))


def test_pictures_that_f_does_not_divide_are_refused(config: Path):
    run = load_run_settings(config, ["data.resolution=18"])
    with pytest.raises(SettingsError, match=r"data.resolution \(18\) .* f \(4\); set it to 16"):
        bench_prepare(run, images=1, rounds=1)


@pytest.mark.parametrize("conditioning", ["text_conditional", "unconditional"])
def test_random_batches_of_a_cache_are_counted(config: Path, conditioning: str):
    prepare_latent_cache(load_run_settings(config))
    result = bench("loader", config, f"conditioning={conditioning}", "--batches", 5, "--rounds", 3)
    assert (result["pictures"], result["crops"], result["captions"]) == (48, 1, 240)
    assert (result["batch_images"], result["tokens_per_image"]) == (2, 16)
    assert result["tokens_per_second"] == pytest.approx(result["batches_per_second"] * 2 * 16)
    assert len(result["batches_per_second_of_rounds"]) == 3
    assert (result["words_per_second"] > 0) == (conditioning == "text_conditional")
    for name in ("open_seconds", "first_batch_seconds", "cache_bytes"):
        assert result[name] > 0
    assert {"open_resident_bytes", "read_resident_bytes", "read_own_bytes"} <= result.keys()


def test_without_a_cache_the_way_to_one_is_told(config: Path):
    with pytest.raises(DataError, match="lgpt prepare"):
        bench("loader", config)
    with pytest.raises(SettingsError, match=r"latent_cache is not set.*latent_cache=runs/latents"):
        bench("loader", config, "latent_cache=null")


@pytest.mark.parametrize("kind", ["prepare", "loader"])
def test_phase_2_has_nothing_to_measure_here(kind: str):
    with pytest.raises(LgptError, match="only phases 1 and 3 have latents"):
        bench(kind, "demo/phase2_shapes")
