"""The VQ-VAE's grammar, contract and files. Its numbers are checked in test_vqgan_import.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lgpt.core.errors import CheckpointError
from lgpt.models.vqvae import VQVAE, inference_state
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.settings.vqvae import VqvaeSettings

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = VQVAEConfig(
    codebook_size=16,
    code_dim=4,
    z_channels=32,
    ch=32,
    ch_mult=(1, 1),
    num_res_blocks=1,
    attn_resolutions=(16,),
    resolution=32,
)


def test_real_size_has_exactly_taming_s_tensors() -> None:
    reference = json.loads((FIXTURES / "taming_f16_16384_keys.json").read_text())
    with torch.device("meta"):
        vqvae = VQVAE(VQVAEConfig(codebook_size=16384, code_dim=256))
    ours = {name: list(tensor.shape) for name, tensor in vqvae.state_dict().items()}
    theirs = {key: shape for key, shape, _ in reference["keys"]}
    assert ours == theirs
    assert sum(p.numel() for p in vqvae.parameters()) == reference["n_params"] == 76_073_859


def test_moving_averages_add_nothing_to_the_inference_state() -> None:
    learned = VQVAE(replace(TINY, codebook_update="gradient"))
    averaged = VQVAE(replace(TINY, codebook_update="ema"))
    assert set(inference_state(averaged)) == set(learned.state_dict())


def test_fields_that_a_file_lacks_do_not_follow_the_defaults_of_run_configs(monkeypatch) -> None:
    """Weights of taming, and folders from before a field was there, go on to mean what they did."""
    told = {"codebook_size": 16, "code_dim": 4}
    defaults = {"codebook_update": "ema", "l2_normalized_codes": True, "num_res_blocks": 7}
    for name, value in defaults.items():
        monkeypatch.setattr(VqvaeSettings.model_fields[name], "default", value)
    VqvaeSettings.model_rebuild(force=True)
    try:
        assert VqvaeSettings(**told).num_res_blocks == 7
        assert VQVAEConfig.from_dict(told) == VQVAEConfig(16, 4)
    finally:
        monkeypatch.undo()
        VqvaeSettings.model_rebuild(force=True)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 14)])
def test_any_sides_that_f_divides(height: int, width: int) -> None:
    vqvae = VQVAE(TINY).eval()
    images = torch.rand(2, 3, height, width) * 2 - 1
    tokens = vqvae.encode(images)
    assert tokens.shape == (2, height // 2, width // 2)
    assert tokens.dtype == torch.long
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < vqvae.vocab_size == 16
    assert vqvae.decode(tokens).shape == images.shape
    output = vqvae(images)
    assert torch.equal(output.tokens, tokens)
    torch.testing.assert_close(output.reconstruction, vqvae.decode(tokens), atol=1e-4, rtol=0)


def test_sides_that_f_does_not_divide_are_named_with_the_nearest_that_fit() -> None:
    with pytest.raises(ValueError, match=r"multiples of 2 .* got 9 x 8; crop to 8 x 8"):
        VQVAE(TINY).encode(torch.zeros(1, 3, 9, 8))


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    vqvae = VQVAE(TINY)
    output = vqvae(torch.rand(1, 3, 8, 8) * 2 - 1)
    (output.reconstruction.square().mean() + output.codebook_loss).backward()
    still = [name for name, p in vqvae.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias before a softmax over keys has no effect: q.k + const.
    assert [name for name in still if not name.endswith(".k.bias")] == []


def test_bf16_weights_train_with_float32_losses() -> None:
    vqvae = VQVAE(TINY).bfloat16()
    output = vqvae(torch.rand(1, 3, 8, 8) * 2 - 1)
    assert output.reconstruction.dtype == torch.bfloat16
    assert output.codebook_loss.dtype == output.commitment_loss.dtype == torch.float32


def test_input_range_changes_what_the_networks_see_and_not_what_callers_do() -> None:
    torch.manual_seed(0)
    usual = VQVAE(TINY).eval()
    other = VQVAE(VQVAEConfig.from_dict({**TINY.to_dict(), "input_range": "0..1"})).eval()
    other.load_state_dict(usual.state_dict())
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(other.latents(images), usual.latents((images + 1) / 2))
    tokens = usual.encode(images)
    torch.testing.assert_close(other.decode(tokens), usual.decode(tokens) * 2 - 1)
    assert usual.weights_digest() != other.weights_digest()


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_folder_round_trip_is_exact(tmp_path: Path, update: str) -> None:
    torch.manual_seed(0)
    config = VQVAEConfig.from_dict({**TINY.to_dict(), "codebook_update": update})
    vqvae = VQVAE(config)
    vqvae(torch.rand(1, 3, 8, 8))
    vqvae.save_pretrained(tmp_path)
    again = VQVAE.from_pretrained(tmp_path)
    assert again.config == config
    assert not again.training
    state, restored = vqvae.state_dict(), again.state_dict()
    assert state.keys() == restored.keys()
    assert all(torch.equal(state[name], restored[name]) for name in state)
    assert again.weights_digest() == vqvae.weights_digest()


def test_digest_sees_a_single_changed_weight_and_ignores_moving_averages() -> None:
    vqvae = VQVAE(VQVAEConfig.from_dict({**TINY.to_dict(), "codebook_update": "ema"}))
    digest = vqvae.weights_digest()
    vqvae.quantize.ema_count += 1
    assert vqvae.weights_digest() == digest
    vqvae.decoder.conv_out.bias.data[0] += 1e-6
    assert vqvae.weights_digest() != digest


def test_folder_that_does_not_fit_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        VQVAE.from_pretrained(tmp_path)
    VQVAE(TINY).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"codebook_size": 17}, r"embedding\.weight is \[16, 4\], the config asks for \[17, 4\]"),
        ({"num_res_blocks": 2}, r"missing decoder\.up\.0\.block\.2\.conv1\.bias"),
        ({"chanels": 3}, r"unknown fields \['chanels'\]"),
        ({"model_type": "bert"}, "does not describe an lgpt VQ-VAE"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(CheckpointError, match=message):
            VQVAE.from_pretrained(tmp_path)


def test_encode_switches_tf32_off_and_leaves_the_switches_as_they_were() -> None:
    vqvae = VQVAE(TINY).eval()
    seen = []
    vqvae.encoder.register_forward_hook(lambda *_: seen.append(tf32_switches()))
    before = tf32_switches()
    assert before[0], "torch's own default changed: the switch may no longer be needed"
    vqvae.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="multiples of 2"):
        vqvae.encode(torch.zeros(1, 3, 9, 8))
    assert seen == [(False, "highest", *before[2:])]
    assert tf32_switches() == before


def tf32_switches() -> tuple[bool, str, bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return (
        cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
    )
