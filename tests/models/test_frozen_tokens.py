"""A VQ-VAE of which only the decoder learns, beside the whole one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_vqvae_start import CONFIG, pictures

from lgpt.models.vqvae import VQVAE


def pair(**changes: object) -> tuple[VQVAE, VQVAE]:
    torch.manual_seed(0)
    whole = VQVAE(replace(CONFIG, **changes))
    frozen = VQVAE(whole.config)
    frozen.load_state_dict(whole.state_dict())
    frozen.freeze_tokens()
    return whole.eval(), frozen


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("input_range", ["-1..1", "0..1"])
def test_it_reconstructs_as_the_whole_one_and_only_the_decoder_gets_gradients(update, input_range):
    whole, frozen = pair(codebook_update=update, input_range=input_range)
    expected, got = whole(pictures()), frozen.train()(pictures())
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.reconstruction, expected.reconstruction)
    assert frozen.state_dict().keys() == whole.state_dict().keys()
    learning = {name.split(".")[0] for name, _ in frozen.named_parameters()}
    assert learning == {"decoder", "post_quant_conv"}
    got.reconstruction.square().mean().backward()
    assert all(p.grad is not None for p in frozen.parameters())
    assert frozen.quantize.finish_step(seed=0, step=0) == 0, "nothing moves the codes"


def test_bf16_and_dropout_change_no_token_and_round_no_frozen_weight():
    whole, frozen = pair(dropout=0.9)
    frozen.bfloat16().train()
    got = frozen(pictures().bfloat16())
    assert torch.equal(got.tokens, whole(pictures()).tokens), "pixels that bf16 rounded are known"
    assert got.reconstruction.dtype == torch.bfloat16
    for name, tensor in frozen.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            assert torch.equal(tensor, whole.state_dict()[name]), name
        else:
            assert tensor.dtype == torch.bfloat16, name
