"""Dropout whose random numbers do not hold a CPU up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lgpt.core.errors import SettingsError

_LEVELS = 2**16


class Dropout(nn.Module):
    """`nn.Dropout`; on a CPU each 64-bit random number decides about four values.

    PyTorch draws one for each value there, on one thread, which was a sixth of a training step's
    time outside of its products (512 tokens, 24 layers of 1024, torch 2.13, AVX2). `p` is taken to
    the next of 65,536 levels, and what is kept is scaled by that one, so that the mean stays.
    torch.compile makes numbers of its own, on all threads, and does not take `random_`.

    Args:
        p: Probability with which a value becomes 0, in [0, 1).

    Raises:
        SettingsError: p is not in that range.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise SettingsError(f"dropout is {p}; it must be at least 0 and less than 1.")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        is_plain = torch.compiler.is_compiling() or x.device.type != "cpu"
        if is_plain or not self.training or self.p == 0.0:
            return functional.dropout(x, self.p, self.training)
        return x * _kept(x, min(round(self.p * _LEVELS), _LEVELS - 1))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _kept(x: Tensor, dropped_levels: int) -> Tensor:
    """0 where x is dropped, else the scale that makes up for it."""
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    levels = words.random_(-(2**63), None).view(torch.int16)[: x.numel()]
    is_kept = levels >= dropped_levels - _LEVELS // 2
    return is_kept.view(x.shape).to(x.dtype) * (_LEVELS / (_LEVELS - dropped_levels))
