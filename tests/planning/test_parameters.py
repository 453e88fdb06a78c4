"""The counted numbers are the modules' own."""

from __future__ import annotations

import json

import pytest
import torch

from lgpt.core.errors import SettingsError
from lgpt.models.clip_encoder import ClipTextEncoder, make_random_clip_text_encoder
from lgpt.models.discriminator import PatchDiscriminator
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.planning.parameters import (
    discriminator_parameters,
    latent_gpt_parameters,
    run_parameters,
    vqvae_parameters,
)
from lgpt.settings.discriminator import DiscriminatorSettings
from lgpt.settings.run import load_run_settings
from lgpt.settings.transformer import TransformerSettings
from lgpt.settings.vqvae import VqvaeSettings


@pytest.mark.parametrize("text_width", [24, None])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"mlp": "gelu"},
        {"mlp_hidden": 40},
        {"norm": "layernorm"},
        {"positions": "learned"},
        {"qk_norm": False},
        {"norm": "layernorm", "mlp": "gelu", "positions": "learned"},
    ],
)
def test_small_transformers_count_as_counted(shape, text_width):
    settings = TransformerSettings(layers=3, hidden=32, heads=4, **shape)
    with torch.device("meta"):
        model = LatentGPT(LatentGPTConfig.from_settings(settings, 50, (4, 6), text_width))
    assert latent_gpt_parameters(settings, 50, 24, text_width) == model.num_parameters()


@pytest.mark.parametrize("name", ["phase3_500m", "phase3_500m_unconditional"])
def test_the_500m_model_has_500m_parameters_within_5_percent(name):
    run = load_run_settings(name, environ={})
    text_width = 512 if run.conditioning == "text_conditional" else None
    with torch.device("meta"):
        model = LatentGPT(
            LatentGPTConfig.from_settings(run.transformer, 16384, (16, 16), text_width)
        )
    assert run_parameters(run) == model.num_parameters()
    assert abs(run_parameters(run) / 500e6 - 1) < 0.05


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"ch_mult": (1, 2, 2, 4), "attn_resolutions": (32,), "code_dim": 8},
        {"codebook_update": "ema", "ch": 32, "num_res_blocks": 1, "attn_resolutions": (256, 16)},
        {"ch": 32, "ch_mult": (2,), "attn_resolutions": (), "z_channels": 48},
    ],
)
def test_vqvaes_count_as_counted(shape):
    settings = VqvaeSettings(**shape)
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig.from_settings(settings))
    assert vqvae_parameters(settings) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("layers", "channels"), [(3, 64), (1, 16), (5, 32)])
def test_discriminators_count_as_counted(layers, channels):
    settings = DiscriminatorSettings(layers=layers, channels=channels)
    with torch.device("meta"):
        model = PatchDiscriminator(layers, channels)
    assert discriminator_parameters(settings) == sum(p.numel() for p in model.parameters())


def test_the_vqgan_of_taming_has_its_published_size():
    codes = {"codebook_update": "gradient", "l2_normalized_codes": False}
    settings = VqvaeSettings(codebook_size=16384, code_dim=256, **codes)
    assert vqvae_parameters(settings) == 76_073_859


def test_sizes_come_from_the_files_when_the_settings_are_silent(tmp_path):
    (tmp_path / "vqvae" / "model").mkdir(parents=True)
    vqvae = {"codebook_size": 64, "code_dim": 8, "ch_mult": [1, 2, 4], "input_range": "-1..1"}
    (tmp_path / "vqvae" / "model" / "config.json").write_text(json.dumps(vqvae))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 24}}))
    known = ["vqvae.codebook_size=null", "vqvae.downsample_factor=null", "data.resolution=32"]
    overrides = [*known, f"vqvae.checkpoint={tmp_path}/vqvae", f"text.encoder={tmp_path}"]
    learned = ["transformer.positions=learned", "sampling.top_k=0"]
    run = load_run_settings("phase3_500m", [*overrides, *learned], {})
    assert run_parameters(run) == latent_gpt_parameters(run.transformer, 64, 8 * 8, 24)


def test_unknown_sizes_are_asked_for():
    silent = ["vqvae.codebook_size=null", "sampling.top_k=0"]
    run = load_run_settings("phase3_500m", silent, {})
    with pytest.raises(SettingsError, match=r"'runs/phase2_vqvae' is not there .*codebook_size"):
        run_parameters(run)
    run = load_run_settings("phase3_500m", ["text.encoder=someone/clip"], {})
    with pytest.raises(SettingsError, match=r"width of text.encoder 'someone/clip' is unknown"):
        run_parameters(run)


def test_the_random_encoder_has_the_width_it_is_made_with(tmp_path):
    run = load_run_settings("demo/phase3_shapes", environ={})
    make_random_clip_text_encoder(tmp_path, ["a red circle"])
    width = ClipTextEncoder.from_pretrained(tmp_path).width
    codes, tokens = run.vqvae.codebook_size, 8 * 8
    assert run_parameters(run) == latent_gpt_parameters(run.transformer, codes, tokens, width)


@pytest.mark.parametrize(
    ("where", "content", "text"),
    [
        ("text.encoder", "{", "cannot be read as JSON"),
        ("text.encoder", "\udcff", "cannot be read as JSON"),
        ("text.encoder", '{"text_config": 5}', "width of text.encoder"),
        ("vqvae.checkpoint", "[" * 100_000, "cannot be read as JSON"),
        ("vqvae.checkpoint", '{"codebook_size": -3}', "its codebook_size is not allowed"),
    ],
)
def test_files_that_are_only_peeked_into_may_be_broken(where, content, text, tmp_path):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    silent = ["vqvae.codebook_size=null", "sampling.top_k=0"]
    run = load_run_settings("phase3_500m", [*silent, f"{where}={tmp_path}"], {})
    if where == "text.encoder":
        known = ["vqvae.codebook_size=16384", f"text.encoder={tmp_path}"]
        run = load_run_settings("phase3_500m", known, {})
    with pytest.raises(SettingsError, match=text):
        run_parameters(run)
    run = load_run_settings("phase3_500m", [*silent, "vqvae.checkpoint=" + "x" * 300], {})
    with pytest.raises(SettingsError, match="is not there to be asked"):
        run_parameters(run)
