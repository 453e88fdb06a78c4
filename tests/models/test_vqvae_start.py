"""First weights of a VQ-VAE out of another one: the same codes, or a sentence about why not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lgpt.core.errors import CheckpointError
from lgpt.models.strict_loading import load_strictly
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.models.vqvae_start import fitted_codes, refuse_another_architecture

CONFIG = VQVAEConfig(
    codebook_size=24,
    code_dim=4,
    z_channels=32,
    ch=32,
    ch_mult=(1, 1),
    num_res_blocks=1,
    attn_resolutions=(4,),
    resolution=8,
)


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (4, 3, 16, 16), generator=generator) / 127.5 - 1


def refusal(**changes: object) -> str:
    there = replace(CONFIG, **changes).to_dict()
    with pytest.raises(CheckpointError) as caught:
        refuse_another_architecture(there, CONFIG.to_dict(), "init_from x")
    return str(caught.value)


def test_what_has_the_same_shapes_but_another_meaning_is_refused_with_the_words_to_write():
    text = refusal(l2_normalized_codes=True, ch_mult=(1, 1, 2))
    assert "init_from x is another VQ-VAE than the vqvae section describes" in text
    assert "l2_normalized_codes is True there and False here" in text
    assert "set vqvae.ch_mult=[1,1,2] vqvae.l2_normalized_codes=true" in text
    assert "attn_resolutions=[8]" in refusal(attn_resolutions=(8,))
    assert "in [-1, 1] only" in refusal(input_range="0..1")


@pytest.mark.parametrize(
    "changes", [{"dropout": 0.1, "codebook_update": "ema"}, {"attn_resolutions": (4, 32)}]
)
def test_how_it_learns_and_names_of_levels_that_are_not_there_may_differ(changes):
    there = replace(CONFIG, **changes).to_dict()
    refuse_another_architecture(there, CONFIG.to_dict(), "init_from x")


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize("before", ["gradient", "ema"])
@pytest.mark.parametrize("now", ["gradient", "ema"])
def test_codes_go_on_whatever_moved_them_before(before, now, is_normalized):
    torch.manual_seed(0)
    source = VQVAE(replace(CONFIG, codebook_update=before, l2_normalized_codes=is_normalized))
    with torch.no_grad():
        source.quantize.embedding.weight.normal_()
    model = VQVAE(replace(source.config, codebook_update=now))
    load_strictly(model, fitted_codes(source.state_dict(), model), "it")
    expected = source.eval()(pictures())
    got = model.eval()(pictures())
    assert torch.equal(got.reconstruction, expected.reconstruction)
    if now == "ema":
        # One step moves codes, but does not throw them onto its own latents as a fresh one does.
        before_step = model.quantize.embedding(tokens=torch.arange(24)).codes.clone()
        model.train()
        model.quantize.begin_step()
        model(pictures())
        model.quantize.revive_dead_codes = False
        model.quantize.finish_step(seed=0, step=0)
        moved = torch.dist(model.quantize.embedding.weight, before_step)
        assert 0 < moved < 0.9 * before_step.norm()
