"""What MLflow is told about a run."""

from __future__ import annotations

from lgpt.settings.phases import logged_parameters, run_tags
from lgpt.settings.run import load_run_settings


def test_tags_and_parameters_of_the_three_phases():
    run = load_run_settings("phase1_pretrained_512", ["conditioning=unconditional"], {})
    assert run_tags(run) == {
        "phase": "1",
        "resolution": "512",
        "conditioning": "unconditional",
        "vqvae_source": "pretrained_hf",
    }
    parameters = logged_parameters(load_run_settings("phase3_500m", environ={}))
    assert parameters == {
        "batch_size": 256,
        "learning_rate": 1e-4,
        "resolution": 256,
        "conditioning": "text_conditional",
        "vqvae_source": "custom",
        "vqvae_checkpoint": "runs/phase2_vqvae",
        "transformer_layers": 24,
        "transformer_hidden": 1024,
        "transformer_heads": 16,
    }
    vqvae = load_run_settings("phase2_vqvae", environ={})
    assert run_tags(vqvae)["vqvae_source"] == "custom"
    parameters = logged_parameters(vqvae)
    assert (parameters["codebook_size"], parameters["downsample_factor"]) == (16384, 16)
    assert parameters["vqvae_checkpoint"] == "runs/phase2_vqvae"


def test_llamagen_is_a_source_of_phase_1():
    words = ["vqvae.source=pretrained_llamagen", "vqvae.checkpoint=vq_ds16_c2i.pt"]
    run = load_run_settings("phase1_pretrained", words, {})
    assert run_tags(run)["vqvae_source"] == "pretrained_llamagen"
    assert logged_parameters(run)["vqvae_checkpoint"] == "vq_ds16_c2i.pt"
