"""What a run makes of a VQ-VAE from elsewhere: one report, and its digest wherever tokens are."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import tiny
import torch

from lgpt.core.errors import DataError
from lgpt.models.vqgan_import import load_vqvae
from lgpt.settings.run import load_run_settings
from lgpt.training.encode_latents import prepare_latent_cache
from lgpt.training.train_transformer import TransformerTask

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_report_is_logged_once_and_cache_and_mlflow_carry_digest_and_range(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = FIXTURES / "llamagen_vq_tiny"
    vqvae = {"source": "pretrained_llamagen", "checkpoint": str(checkpoint)}
    config = tiny.transformer_run(tmp_path, 8, phase=1, vqvae=vqvae, conditioning="unconditional")
    del config["text"]
    path = tiny.write(tmp_path / "phase1.yaml", config)
    run = load_run_settings(path, environ={})
    with caplog.at_level(logging.INFO, logger="lgpt"):
        prepare_latent_cache(run)
    assert caplog.text.count("tensors matched") == 1
    assert caplog.text.count("64 codes of width 8 at unit length, f=16, pictures in -1..1") == 1
    digest = load_vqvae("pretrained_llamagen", checkpoint).weights_digest()
    assert run.latent_cache is not None
    manifest = json.loads((run.latent_cache / "train" / "manifest.json").read_text())
    assert manifest["fingerprint"]["vqvae_weights"] == digest
    assert manifest["fingerprint"]["vqvae_input_range"] == "-1..1"
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lgpt"):
        task = TransformerTask(run, torch.device("cpu"))
    assert caplog.text.count("tensors matched") == 1
    assert task.parameters_to_log()["vqvae_digest"] == digest
    other = load_run_settings(path, ["vqvae.input_range=0..1"], environ={})
    with pytest.raises(DataError, match="vqvae_input_range"):
        TransformerTask(other, torch.device("cpu"))
