"""What a CPU needs of flash-attn (2.7 or newer) to see how often its kernel is run."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

_SCHEMA = "(Tensor q, Tensor k, Tensor v, bool causal) -> (Tensor, Tensor)"


def install_fake_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test: the package, its module of kernels and its operation.

    As the real ones are built: the operation calls `flash_attn_2_cuda.fwd`, and an autograd
    function around it keeps what it gives for the backward pass.
    """
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn itself is here")
    kernels, package = ModuleType("flash_attn_2_cuda"), ModuleType("flash_attn")
    kernels.fwd = _forward  # type: ignore[attr-defined]
    package.flash_attn_func = _Attention.call  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    library = torch.library.Library("flash_attn", "FRAGMENT")
    library.define("_flash_attn_forward" + _SCHEMA)
    library.impl("_flash_attn_forward", lambda *args: kernels.fwd(*args), "CPU")
    monkeypatch.setattr(_Attention, "library", library)  # it ends with the last reference


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention and the logarithms of its softmax's sums."""
    q_BNLK, k_BNSK = q.transpose(1, 2), k.transpose(1, 2)
    scores = q_BNLK @ k_BNSK.transpose(2, 3) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
    attended = scores.softmax(dim=-1) @ v.transpose(1, 2)
    return attended.transpose(1, 2).contiguous(), scores.logsumexp(dim=-1)


class _Attention(torch.autograd.Function):
    library: Any = None

    @classmethod
    def call(cls, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return cls.apply(q, k, v, causal)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        attended, sums = torch.ops.flash_attn._flash_attn_forward(q, k, v, causal)
        ctx.save_for_backward(q, k, v, attended, sums)
        ctx.causal = causal
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [tensor.detach().transpose(1, 2).requires_grad_() for tensor in (q, k, v)]
            attended = functional.scaled_dot_product_attention(*inputs, is_causal=ctx.causal)
        found = torch.autograd.grad(attended, inputs, gradient.transpose(1, 2))
        return *(tensor.transpose(1, 2) for tensor in found), None
