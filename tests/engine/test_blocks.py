"""Checkpointed blocks: the same gradients, alone and under ZeRO, and less that is kept."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Callable

import jaxtyping
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from lgpt.core.errors import SettingsError
from lgpt.engine.blocks import apply_block_settings, apply_vqvae_block_settings
from lgpt.engine.start import Float32Products
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.models.vqvae import VQVAE, VQVAEConfig
from lgpt.settings.blocks import BlockSettings, VqvaeBlockSettings
from lgpt.settings.vqvae import VqvaeSettings

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
import tiny

CONFIG = LatentGPTConfig(32, 4, 4, 8, layers=4, hidden=32, heads=2, dropout=0.2, zero_head=False)
MODES: list[dict[str, Any]] = [
    {"checkpointing": "full"},
    {"checkpointing": "full", "checkpointed_by": "deepspeed"},
    {"checkpointing": "every_n", "every": 2},
    {"checkpointing": "every_n", "every": 2, "checkpointed_by": "deepspeed"},
    {"checkpointing": "selective"},
]
# With how many of CONFIG's four blocks are computed a second time.
COMPILED: list[tuple[dict[str, Any], int]] = [
    ({}, 0),
    ({"checkpointing": "full"}, 4),
    ({"checkpointing": "full", "checkpointed_by": "deepspeed"}, 4),
    ({"checkpointing": "every_n", "every": 2}, 2),
]


def gradients(
    mode: dict[str, Any], dtype: torch.dtype = torch.float32, dropout: float = CONFIG.dropout
) -> tuple[list[torch.Tensor], int]:
    """Of all parameters, and the bytes that the forward pass kept for the backward pass."""
    torch.manual_seed(0)
    model = LatentGPT(dataclasses.replace(CONFIG, dropout=dropout)).train().to(dtype)
    apply_block_settings(model, BlockSettings(**mode))
    tokens, text = torch.randint(32, (2, 16)), torch.randn(2, 3, 8).to(dtype)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(tokens, text, targets=tokens, null_text=torch.tensor([True, False]))
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())


def vqvae_gradients(
    checkpointing: str, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], int]:
    """As `gradients`, of a VQ-VAE with attention, shortcuts and dropout."""
    torch.manual_seed(0)
    shape = {"codebook_size": 32, "code_dim": 4, "z_channels": 32, "ch": 32, "resolution": 16}
    levels = {"ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "dropout": 0.2}
    model = VQVAE(VQVAEConfig.from_settings(VqvaeSettings(**shape, **levels))).train().to(dtype)
    apply_vqvae_block_settings(model, VqvaeBlockSettings(checkpointing=checkpointing))
    pictures = (torch.rand(2, 3, 16, 16) * 2 - 1).to(dtype)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(pictures)
        losses = output.codebook_loss + output.commitment_loss
        loss = (output.reconstruction - pictures).abs().mean() + losses
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())


def test_a_checkpointed_vqvae_has_the_same_gradients_and_keeps_less_than_half() -> None:
    expected, kept_without = vqvae_gradients("none")
    found, kept = vqvae_gradients("full")
    assert len(found) == len(expected)
    for mine, reference in zip(found, expected):
        assert torch.equal(mine, reference)
    assert kept < 0.5 * kept_without, (kept, kept_without)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_are_those_without_checkpointing(mode: dict[str, Any]) -> None:
    expected, kept_without = gradients({})
    found, kept = gradients(mode)
    assert len(found) == len(expected)
    for mine, reference in zip(found, expected):
        torch.testing.assert_close(mine, reference)
    if "deepspeed" not in mode.values():  # DeepSpeed keeps what these hooks do not see
        assert kept < kept_without


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_checkpointed_blocks_in_bf16_go_with_float32_products(
    mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Float32Products, "is_on", True)  # as afford_bf16 does on such a CPU
    with Float32Products():
        expected, _ = gradients({}, torch.bfloat16)
        found, _ = gradients(mode, torch.bfloat16)
    assert all(torch.equal(mine, reference) for mine, reference in zip(found, expected))


def test_a_checkpointed_vqvae_in_bf16_goes_with_float32_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Float32Products, "is_on", True)
    with Float32Products():
        expected, _ = vqvae_gradients("none", torch.bfloat16)
        found, _ = vqvae_gradients("full", torch.bfloat16)
    assert all(torch.equal(mine, reference) for mine, reference in zip(found, expected))


@pytest.mark.parametrize("checkpointed_by", ["torch", "deepspeed"])
def test_holes_are_looked_for_before_each_block_forward_and_backward(
    checkpointed_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[None] = []
    monkeypatch.setattr("lgpt.engine.blocks._holes.give_back", lambda: looks.append(None))
    gradients({"checkpointing": "full", "checkpointed_by": checkpointed_by})
    assert len(looks) == 2 * CONFIG.layers
    gradients({})
    assert len(looks) == 2 * CONFIG.layers


def test_every_second_block_keeps_more_than_none_of_them() -> None:
    assert gradients(MODES[0])[1] < gradients(MODES[2])[1]


# Dynamo (torch 2.13) hides it by `showwarning`, too late where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("mode", "computed_again"), COMPILED, ids=str)
def test_gradients_of_compiled_blocks_are_those_of_plain_ones(
    mode: dict[str, Any], computed_again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_compile, calls = torch.compile, []

    def counted_compile(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch_compile(function)

        def call(*args: Any) -> Any:
            calls.append(function)
            return compiled(*args)

        return call

    monkeypatch.setattr("torch.compile", counted_compile)
    # Dynamo cannot read the checks of types that the tests put around every function.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    counters.clear()
    expected, kept_without = gradients({}, dropout=0.0)
    assert not counters["stats"]
    found, kept = gradients({**mode, "compile": True}, dropout=0.0)
    assert len(calls) == CONFIG.layers + computed_again
    assert len(set(calls)) == CONFIG.layers
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0
    assert not counters["graph_break"]
    assert len(found) == len(expected)
    for mine, reference in zip(found, expected):
        assert float((mine - reference).abs().max()) <= 1e-5 * float(reference.abs().max())
    assert (kept < kept_without) == (computed_again > 0)


def test_blocks_are_not_compiled_where_products_are_made_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Float32Products, "is_on", True)
    with pytest.raises(SettingsError, match=r"bf16 so slowly .* training.precision=fp32"):
        gradients({"compile": True})


def test_blocks_are_not_compiled_on_a_cpu_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match=r"needs g\+\+ on a CPU.*\.compile=false"):
        gradients({"compile": True})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dropout", "modes"),
    [
        pytest.param(0.2, MODES, id="checkpointed"),
        # Compiled blocks draw other dropout masks.
        pytest.param(0.0, [{**mode, "compile": True} for mode, _ in COMPILED[:2]], id="compiled"),
    ],
)
def test_losses_and_gradient_norms_under_zero_are_those_without(
    dropout: float, modes: list[dict[str, Any]], tmp_path: Path
) -> None:
    out, worker = tmp_path / "seen.json", Path(__file__).with_name("blocks_worker.py")
    texts = [json.dumps(mode) for mode in ({}, *modes)]
    tiny.on_two_ranks(worker, out, dropout, *texts)
    seen = json.loads(out.read_text())
    for stage in (2, 3):
        expected = np.array(seen[f"{stage} {{}}"]["steps"])
        assert np.ptp(expected[:, 0]) > 0.01, "nothing moved"
        for mode, text in zip(modes, texts[1:]):
            found = seen[f"{stage} {text}"]
            np.testing.assert_allclose(found["steps"], expected, rtol=1e-5)
            assert (found["graphs"] > 0) == ("compile" in mode)
            assert found["graph_breaks"] == {}
