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


def _norms(dtype: torch.dtype, device: str = "cpu") -> tuple[RMSNorm, nn.RMSNorm]:
    """Ours in `dtype`, and PyTorch's in float32 with the same weight."""
    ours, plain = RMSNorm(64, eps=1e-6), nn.RMSNorm(64, eps=1e-6)
    nn.init.uniform_(ours.weight, 0.5, 2.0)
    ours.to(dtype)
    plain.load_state_dict(ours.state_dict())
    return ours.to(device), plain.to(device)


def _plain_swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


def _input(dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(SHAPE)).to(dtype).requires_grad_()


def _bytes_kept(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """For the backward pass, without parameters."""
    kept: dict[int, Tensor] = {}  # held, so that no storage is used twice

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        function(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHAPE, (64,), (0, 64)])
def test_rms_norm_is_pytorchs_in_float32_rounded_once(dtype, device, shape, monkeypatch) -> None:
    monkeypatch.setattr(rms_norm, "_HAS_KERNEL", False)
    torch.manual_seed(0)
    ours, plain = _norms(dtype, device)
    x = (3 * torch.randn(shape)).to(device, dtype).requires_grad_()
    wide_x = x.detach().to(torch.float32, copy=True).requires_grad_()
    gradient = torch.randn(shape).to(device, dtype)
    got, expected = ours(x), plain(wide_x)
    with torch.no_grad():
        assert torch.equal(ours(x), got)
    with torch.inference_mode():
        assert torch.equal(ours(x), got)
    if device == "cpu":
        assert torch.equal(got, expected.to(dtype))
    of_ours = torch.autograd.grad(got, (x, ours.weight), gradient)
    of_plain = torch.autograd.grad(expected, (wide_x, plain.weight), gradient.float())
    relative = 1e-5 if dtype == torch.float32 else 2**-7  # one step of bf16
    for mine, reference in zip((got, *of_ours), (expected, *of_plain)):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), reference, rtol=relative, atol=1e-5)


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
    of_pytorch = _bytes_kept(plain.bfloat16(), x)  # 6 bytes in torch 2.6, 8 in 2.13
    assert of_pytorch >= 6 * x.numel(), "PyTorch keeps less now: ours has no use"
    assert _bytes_kept(swiglu, x) == 2 * x.numel()
    assert _bytes_kept(_plain_swiglu, x) == 3 * x.numel()


@pytest.mark.parametrize("of", ["norm", "swiglu"])
def test_a_compiled_block_has_no_break_at_it(of: str) -> None:
    function: Any = RMSNorm(64, eps=1e-6) if of == "norm" else swiglu
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = _input(torch.float32)
    torch.testing.assert_close(compiled(x), function(x))
