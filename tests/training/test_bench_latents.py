"""What `lgpt bench train` reads: the run's own cache or a random one, as training would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from lgpt.core.errors import DataError
from lgpt.data.latent_cache import LatentCache
from lgpt.models.latent_gpt import LatentGPTConfig
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.settings.run import load_run_settings
from lgpt.settings.vqvae import VqvaeSettings
from lgpt.training.bench_latents import CachedBatches, training_cache
from lgpt.training.encode_latents import prepare_latent_cache
from lgpt.training.latent_batches import TrainingLatents

SMALL = LatentGPTConfig(64, 4, 4, 24, layers=2, hidden=32, heads=2)
CPU = torch.device("cpu")


def _run(folder: Path, *overrides: str) -> Any:
    path = tiny.write(folder / "run.yaml", tiny.transformer_run(folder, 4))
    return load_run_settings(path, list(overrides), environ={})


def _task(cache: Path, config: LatentGPTConfig, micro_batch: int = 3) -> dict[str, Any]:
    model = {"text_width": config.text_width}
    return {
        "cache": str(cache),
        "model": model,
        "seed": 5,
        "cond_drop": 0.5,
        "micro_batch": micro_batch,
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_without_a_cache_random_latents_of_the_models_shape_are_read(tmp_path: Path, dtype: str):
    with training_cache(_run(tmp_path, f"text.cache_dtype={dtype}"), SMALL, 7) as source:
        assert source.remark == "a temporary cache of random latents"
        assert LatentCache.open(source.folder).manifest["text_dtype"] == dtype
        batches = CachedBatches(_task(source.folder, SMALL), CPU, torch.bfloat16)
        (first, (text, mask, dropped)), (second, _) = batches.next(), batches.next()
        assert (first.shape, text.shape, mask.shape) == ((3, 16), (3, 7, 24), (3, 7))
        assert (text.dtype, bool(mask.all()), len(dropped)) == (torch.bfloat16, True, 3)
        assert 0.8 < float(text.float().std()) < 1.2
        assert not torch.equal(first, second)
        many = torch.cat([batches.next()[0] for _ in range(100)])
        assert sorted(many.unique().tolist()) == list(range(64))
        assert batches.words == [7] * 102
    assert not source.folder.exists()


def test_an_unconditional_model_reads_no_text(tmp_path: Path):
    config = LatentGPTConfig(70_000, 4, 4, None, layers=2, hidden=32, heads=2)
    with training_cache(_run(tmp_path), config, 7) as source:
        batches = CachedBatches(_task(source.folder, config), CPU, torch.float32)
        tokens, (text, mask, _) = batches.next()
    assert (text, mask, batches.words) == (None, None, [0])
    assert int(tokens.max()) > 2**16


def test_a_batch_is_the_one_that_training_takes_at_this_step(tmp_path: Path):
    with training_cache(_run(tmp_path), SMALL, 7) as source:
        batches = CachedBatches(_task(source.folder, SMALL), CPU, torch.float32)
        batches.next()
        tokens, (text, _, dropped) = batches.next()
        wanted = TrainingLatents(LatentCache.open(source.folder), 5, 0.5).at(np.arange(3, 6))
    assert torch.equal(tokens, wanted.latents.tokens)
    assert torch.equal(text, wanted.latents.text)
    assert torch.equal(dropped, wanted.null_text)


def test_the_runs_own_cache_is_read_where_it_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    settings = VqvaeSettings(**tiny.VQVAE)
    VQVAE(VQVAEConfig.from_settings(settings)).save_pretrained(tmp_path / "vqvae")
    run = _run(tmp_path)
    prepare_latent_cache(run)
    own = tmp_path / "latents" / "train"
    width = LatentCache.open(own).text_width
    fitting = LatentGPTConfig(32, 4, 4, width, layers=2, hidden=32, heads=2)
    with training_cache(run, fitting, 7) as source:
        assert (source.folder, source.remark) == (own, str(own))
        batches = CachedBatches(_task(source.folder, fitting), CPU, torch.float32)
        assert batches.next()[0].shape == (3, 16)
    assert own.exists()
    with training_cache(run, SMALL, 7) as source:  # 64 codes
        assert source.remark == "a temporary cache of random latents"
    assert "'codes': 32" in caplog.text
    assert "'codes': 64" in caplog.text
    (own / "tokens.bin").write_bytes(b"cut short")
    with pytest.raises(DataError, match="damaged"), training_cache(run, fitting, 7):
        pass
