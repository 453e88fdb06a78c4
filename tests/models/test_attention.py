"""Rotary positions, kernels, and how the kernel is chosen."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lgpt.core.errors import SettingsError
from lgpt.models import attention
from lgpt.models.attention import (
    Rope2d,
    cached_attention,
    causal_attention,
    choose_kernel,
    product_dtype,
    rotate,
)
from lgpt.models.kv_cache import ImageCache
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig


def test_rotation_matches_multiplication_by_complex_numbers() -> None:
    torch.manual_seed(0)
    height, width, head_width = 3, 5, 8
    x = torch.randn(2, 1 + height * width, 1, head_width)
    turned = rotate(x, Rope2d(height, width, head_width)(0, 1 + height * width, torch.float32))
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    for place in range(1 + height * width):
        row, column = divmod(place - 1, width)
        for pair in range(4):
            frequency = 10000.0 ** (-(pair % 2) / 2)
            steps = 0 if place == 0 else (row + 1 if pair < 2 else column + 1)
            angle = torch.tensor(steps * frequency, dtype=torch.float64)
            expected = pairs[:, place, 0, pair] * torch.exp(1j * angle)
            torch.testing.assert_close(turned[:, place, 0, pair].double(), expected.real)
            torch.testing.assert_close(turned[:, place, 0, pair + 4].double(), expected.imag)


def test_scores_depend_on_row_and_column_distances_only() -> None:
    torch.manual_seed(0)
    rope = Rope2d(4, 6, 8)
    q, k = torch.randn(8), torch.randn(8)
    rotation = rope(0, 25, torch.float32)

    def score(query_at: tuple[int, int], key_at: tuple[int, int]) -> Tensor:
        both = torch.zeros(1, 25, 1, 8)
        places = [1 + row * 6 + column for row, column in (query_at, key_at)]
        both[0, places[0], 0], both[0, places[1], 0] = q, k
        turned = rotate(both, rotation)[0, :, 0]
        return turned[places[0]] @ turned[places[1]]

    torch.testing.assert_close(score((1, 2), (0, 4)), score((3, 3), (2, 5)))
    assert not torch.isclose(score((1, 2), (0, 4)), score((1, 2), (0, 3)))


def test_start_token_keeps_its_query_and_key() -> None:
    x = torch.randn(1, 1, 2, 8)
    torch.testing.assert_close(rotate(x, Rope2d(2, 2, 8)(0, 1, torch.float32)), x)


def test_rotation_does_not_upcast_bf16() -> None:
    rotation = Rope2d(2, 2, 8)(0, 5, torch.bfloat16)
    assert rotate(torch.randn(1, 5, 2, 8).bfloat16(), rotation).dtype == torch.bfloat16


@pytest.fixture
def _fresh_choice() -> Iterator[None]:
    for cached in (choose_kernel, attention.flash_attention_problem):
        cached.cache_clear()
    yield
    for cached in (choose_kernel, attention.flash_attention_problem):
        cached.cache_clear()


@pytest.mark.usefixtures("_fresh_choice")
def test_auto_takes_sdpa_without_a_gpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lgpt"):
        for _ in range(3):
            assert choose_kernel("auto", "cpu", torch.float32, 64) == "sdpa"
    assert [r.message for r in caplog.records] == [
        "attention: PyTorch's SDPA, because the model is on cpu"
    ]


@pytest.mark.usefixtures("_fresh_choice")
@pytest.mark.parametrize(
    ("device", "dtype", "head_width", "reason"),
    [
        ("cpu", torch.bfloat16, 64, "the model is on cpu"),
        ("cuda", torch.float32, 64, "the activations are torch.float32"),
        ("cuda", torch.bfloat16, 20, "the model has 20"),
        ("cuda", torch.bfloat16, 64, r"no CUDA device|cannot be imported|compute capability"),
    ],
)
def test_flash_by_name_that_cannot_be_had_is_an_error_with_the_reason(
    device: str, dtype: torch.dtype, head_width: int, reason: str
) -> None:
    with pytest.raises(SettingsError, match=f"'flash', but .*({reason})"):
        choose_kernel("flash", device, dtype, head_width)


@pytest.mark.usefixtures("_fresh_choice")
def test_flash_attn_without_its_kernels_is_found_out_by_importing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    # What flash-attn 4 alone leaves behind: the package without these names.
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert choose_kernel("auto", "cuda", torch.bfloat16, 64) == "sdpa"
    attention.flash_attention_problem.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "(7, 5)" in str(attention.flash_attention_problem())


def _stand_in_for_flash_attn() -> types.ModuleType:
    """flash-attn's two functions in plain PyTorch, from its documentation; keywords only."""

    def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("blnk,bsnk->bnls", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bnls,bsnk->blnk", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)

    def flash_attn_func(*, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        assert causal
        return softmax_attention(q, k, v, torch.ones(q.shape[1], k.shape[1]).tril().bool())

    def flash_attn_with_kvcache(
        *,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor,
        v: Tensor,
        cache_seqlens: Tensor,
        causal: bool,
    ) -> Tensor:
        assert causal
        assert cache_seqlens.dtype == torch.int32
        rows = torch.arange(len(q))
        k_cache[rows, cache_seqlens.long()] = k[:, 0]
        v_cache[rows, cache_seqlens.long()] = v[:, 0]
        seen = torch.arange(k_cache.shape[1])[None] <= cache_seqlens[:, None]
        return softmax_attention(q, k_cache, v_cache, seen[:, None, None])

    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    return module


def test_flash_path_means_the_same_as_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: layouts, keywords and cache handling. The real kernel is for `gpu` tests."""
    monkeypatch.setitem(sys.modules, "flash_attn", _stand_in_for_flash_attn())
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind(0)
    torch.testing.assert_close(
        causal_attention(q, k, v, "flash"), causal_attention(q, k, v, "sdpa")
    )
    model = LatentGPT(LatentGPTConfig(16, 2, 3, None, layers=2, hidden=16, heads=2)).eval()
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.randint(16, (2, 6))
    expected = model(tokens)
    monkeypatch.setattr(model, "_kernel", lambda x: "flash")
    torch.testing.assert_close(model(tokens), expected)
    state = model.start_decoding(max_batch=2)
    inputs = [None, *tokens[:, :-1].unbind(1)]
    decoded = torch.stack([model.decode_next(token, state) for token in inputs], dim=1)
    torch.testing.assert_close(decoded, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
def test_every_kernel_decodes_by_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", _stand_in_for_flash_attn())
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 4, 8).to(dtype).unbind(0)
    kept = product_dtype(q) if kernel == "sdpa" else dtype
    cache = ImageCache(*torch.full((2, 2, 9, 4, 8), float("nan"), dtype=kept).unbind(0))
    if kernel == "flash":  # the stand-in reads beyond the position and masks it away
        cache.keys.zero_()
        cache.values.zero_()
    for place in range(6):
        now = slice(place, place + 1)
        out = cached_attention(q[:, now], k[:, now], v[:, now], cache, place, kernel)
        scores = torch.einsum("bnk,bsnk->bns", q[:, place].double(), k[:, : place + 1].double())
        weights = (scores * 8**-0.5).softmax(dim=-1)
        expected = torch.einsum("bns,bsnk->bnk", weights, v[:, : place + 1].double())
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[:, 0].double(), expected, atol=tolerance, rtol=0)
        assert out.dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_on_a_gpu_equals_the_full_forward(kernel: str, dtype: torch.dtype) -> None:
    if kernel == "flash":
        if dtype == torch.float32:
            pytest.skip("flash-attn has no float32")
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    config = LatentGPTConfig(64, 4, 4, 8, layers=2, hidden=64, heads=4, attention=kernel)
    model = LatentGPT(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = model.to("cuda", dtype)
    tokens = torch.randint(64, (3, 16), device="cuda")
    text = torch.randn(3, 5, 8, device="cuda", dtype=dtype)
    null_text = torch.tensor([False, True, False], device="cuda")
    with torch.no_grad():
        expected = model(tokens, text, null_text=null_text)
    state = model.start_decoding(text, null_text=null_text)
    decoded = [model.read_given(tokens[:, :3], state)]
    decoded += [model.decode_next(tokens[:, place], state) for place in range(3, 15)]
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(
        torch.stack(decoded, dim=1), expected[:, 3:], atol=tolerance, rtol=tolerance
    )


@pytest.mark.gpu
def test_real_flash_attn_equals_sdpa_on_a_gpu() -> None:
    pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 64, 4, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    torch.testing.assert_close(
        causal_attention(q, k, v, "flash"), causal_attention(q, k, v, "sdpa"), atol=2e-2, rtol=2e-2
    )
