"""SwiGLU that keeps its input for the backward pass, and not silu of half of it too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * value of the two halves of the last axis.

    For the backward pass x is kept, and silu(gate), half as much again, computed once more;
    under torch.compile, which decides about that itself, it is written out plainly. Source:
    Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6.

    Args:
        x: [..., 2 * inner]; gates, then values.

    Returns:
        [..., inner], in x's dtype.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        gate, value = x.chunk(2, dim=-1)
        return functional.silu(gate) * value
    gated: Tensor = _SwiGLU.apply(x)
    return gated


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, value = x.chunk(2, dim=-1)
        return functional.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        of_x = torch.empty_like(x)
        of_gate, of_value = of_x.chunk(2, dim=-1)
        torch.mul(gradient, functional.silu(gate), out=of_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return of_x
