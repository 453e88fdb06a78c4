"""RMSNorm and SwiGLU: what PyTorch computes, and less that is kept for the backward pass."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from lgpt.models import rms_norm
from lgpt.models.rms_norm import RMSNorm
from lgpt.models.swiglu import swiglu

DTYPES = [torch.float32, torch.bfloat16]
SHAPE = (2, 3, 5, 64)


def _norms(dtype: torch.dtype) -> tuple[RMSNorm, nn.RMSNorm]:
    ours, plain = RMSNorm(64, eps=1e-6), nn.RMSNorm(64, eps=1e-6)
    nn.init.uniform_(plain.weight, 0.5, 2.0)
    ours.load_state_dict(plain.state_dict())
    return ours.to(dtype), plain.to(dtype)


def _plain_swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


def _input(dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(SHAPE)).to(dtype).requires_grad_()


def _bytes_kept(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """For the backward pass, without parameters."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held: list[Any] = []  # so that no storage is used twice
    with saved_tensors_hooks(lambda t: (held.append(t), note(t))[1], lambda t: t):
        held.append(function(x))
    return sum(kept.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_pytorchs_and_its_gradients_are(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, plain = _norms(dtype)
    x, gradient = _input(dtype), torch.randn(SHAPE).to(dtype)
    got, expected = ours(x), plain(x)
    assert torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(ours(x), expected)
    (got_x, got_weight) = torch.autograd.grad(got, (x, ours.weight), gradient)
    (of_x, of_weight) = torch.autograd.grad(expected, (x, plain.weight), gradient)
    assert (got_x.dtype, got_weight.dtype) == (dtype, dtype)
    relative = 1e-5 if dtype == torch.float32 else 2**-7  # one step of bf16
    torch.testing.assert_close(got_x, of_x, rtol=relative, atol=1e-6)
    torch.testing.assert_close(got_weight, of_weight, rtol=relative, atol=1e-4)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_rms_norms_gradients_are_those_of_differences(needs: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(6, eps=1e-2).double()
    nn.init.uniform_(norm.weight, -2.0, 2.0)
    norm.weight.requires_grad_(needs[1])
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=needs[0])

    def by_weight(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(by_weight, (x, norm.weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_its_gradient_are_the_plain_ones_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gradient = _input(dtype), torch.randn(2, 3, 5, 32).to(dtype)
    got, expected = swiglu(x), _plain_swiglu(x)
    assert torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(swiglu(x), expected)
    assert torch.equal(*(torch.autograd.grad(result, x, gradient)[0] for result in (got, expected)))


def test_the_input_is_kept_and_little_else() -> None:
    ours, plain = _norms(torch.bfloat16)
    x = _input(torch.bfloat16)
    assert _bytes_kept(ours, x) == 2 * x.numel() + 4 * x.numel() // 64
    assert _bytes_kept(plain, x) >= 8 * x.numel(), "PyTorch keeps less now: ours has no use"
    assert _bytes_kept(swiglu, x) == 2 * x.numel()
    assert _bytes_kept(_plain_swiglu, x) == 3 * x.numel()


@pytest.mark.parametrize("of", ["norm", "swiglu"])
def test_a_compiled_block_has_no_break_at_it(of: str) -> None:
    function: Any = RMSNorm(64, eps=1e-6) if of == "norm" else swiglu
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = _input(torch.float32)
    torch.testing.assert_close(compiled(x), function(x))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rms_norm_without_pytorchs_kernel_is_near_the_one_in_float32(device, monkeypatch) -> None:
    monkeypatch.setattr(rms_norm, "_HAS_KERNEL", False)
    torch.manual_seed(0)
    ours, _ = _norms(torch.bfloat16)
    _, exact = _norms(torch.float32)
    exact.load_state_dict(ours.state_dict())
    x, gradient = (3 * torch.randn(SHAPE)).bfloat16(), torch.randn(SHAPE).bfloat16()
    results = []
    for norm, dtype in ((ours, torch.bfloat16), (exact, torch.float32)):
        given = x.to(device, dtype, copy=True).requires_grad_()
        normed = norm.to(device)(given)
        normed.backward(gradient.to(device, dtype))
        results.append([normed, given.grad, norm.weight.grad])
    for got, expected in zip(*results):
        torch.testing.assert_close(got.float(), expected, rtol=2**-7, atol=1e-3)
