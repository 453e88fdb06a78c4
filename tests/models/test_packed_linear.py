"""Packed matrices multiply as PyTorch's own, and no row depends on its company."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lgpt.models import packed_linear
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.models.packed_linear import PackedLinear, pack_linear_layers
from lgpt.sampling.generate import generate_tokens

SHAPES = [(96, 64), (64, 512), (1000, 48)]
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not packed_linear.onednn_multiplies_bf16(), reason="oneDNN: no bf16 for this CPU"
        ),
    ),
]


def _operands(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(outputs, inputs).to(dtype), torch.randn(40, inputs).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_linear_s(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x = _operands(*shape, dtype)
    packed = PackedLinear(weight)
    expected = functional.linear(x.double(), weight.double())
    error = (packed(x).double() - expected).abs().max()
    plain_error = (functional.linear(x, weight).double() - expected).abs().max()
    assert error <= 4 * plain_error
    assert packed(x).dtype == dtype
    torch.testing.assert_close(packed(x.view(2, 20, -1)), packed(x).view(2, 20, -1))
    assert torch.equal(packed.state_dict()["weight"], weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x = _operands(*shape, dtype)
    packed = PackedLinear(weight)
    together = packed(x)
    for rows in (1, 2, 3, 4, 5, 7, 16, 31):
        assert torch.equal(packed(x[:rows]), together[:rows]), rows


def _model(dtype: torch.dtype) -> LatentGPT:
    torch.manual_seed(0)
    model = LatentGPT(LatentGPTConfig(64, 4, 4, 8, layers=2, hidden=64, heads=4)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_s_pictures_are_the_same_in_any_batch_bit_for_bit(
    dtype: torch.dtype,
) -> None:
    model = _model(dtype)
    assert pack_linear_layers(model)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    text, mask = torch.randn(7, 5, 8), torch.arange(5) < torch.arange(7).unsqueeze(1) % 5 + 1
    choices = {"guidance": 5.0, "top_k": 40}
    together = generate_tokens(model, text, mask, seeds=range(7), **choices)
    for first, last in ((0, 1), (1, 3), (3, 7), (6, 7)):
        part = generate_tokens(
            model, text[first:last], mask[first:last], seeds=range(first, last), **choices
        )
        assert torch.equal(part, together[first:last])


def test_in_bf16_a_cpu_without_its_products_draws_unpacked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Packing raises on one with AVX2 alone; the model must stay as it was."""
    monkeypatch.setattr(packed_linear, "onednn_multiplies_bf16", lambda: False)
    with caplog.at_level("INFO", "lgpt"):
        model = _model(torch.bfloat16)
        assert not pack_linear_layers(model)
    assert any(isinstance(module, nn.Linear) for module in model.modules())
    assert "oneDNN has no bf16 products for this CPU" in caplog.text
    drawn = generate_tokens(model, torch.randn(2, 5, 8).bfloat16(), None, seeds=range(2))
    assert drawn.shape == (2, 4, 4)
    assert pack_linear_layers(_model(torch.float32))


def test_a_packed_model_means_and_saves_what_it_meant_before() -> None:
    plain = _model(torch.float32)
    packed = copy.deepcopy(plain)
    pack_linear_layers(packed)
    tokens, text = torch.randint(64, (3, 16)), torch.randn(3, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens, text), plain(tokens, text), atol=1e-4, rtol=0)
    saved = packed.state_dict()
    assert saved.keys() == plain.state_dict().keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in plain.state_dict().items())
