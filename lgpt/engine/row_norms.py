"""What DeepSpeed asks of gradients and does to clip them, by one look at each on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_ROW = 4096  # as many float32 squares as can be added up without losing digits


def take_norms_by_rows(optimizer: Any, device: Any) -> None:
    """On a CPU, give DeepSpeed's gradient norm the norms of rows instead of the gradients.

    For the sum of squares it makes a float64 copy of every gradient (0.19.8, ZeRO-2 and 3), which
    took 15 times as long. The norm of the rows' norms is the same number to 2e-6 or better; that
    of a whole float32 gradient would be wrong by 3e-4. Where a row's squares are too large for
    float32, DeepSpeed's own way decides.

    In bf16 ZeRO-2 looks for what is not finite first: norms of rows answer that too, and are kept
    for the norm.
    """
    of_gradients = getattr(optimizer, "get_grad_norm_direct", None)
    if of_gradients is None or device.type != "cpu":  # ZeRO-1 in bf16 has another optimizer
        return
    norms = _RowNorms()
    has_inf_or_nan = getattr(optimizer, "_has_inf_or_nan", None)

    def by_rows(gradients: Sequence[torch.Tensor], params: Any, norm_type: float = 2) -> Any:
        if norm_type != 2:
            return of_gradients(gradients, params, norm_type)
        # DeepSpeed leaves out padding by an attribute of the tensor.
        rows = [
            gradient if getattr(gradient, "_zero_padding", False) else norms.take(gradient)
            for gradient in gradients
        ]
        norm = of_gradients(rows, params, norm_type)
        # -1 stands for a norm that is not finite, on all ranks.
        return of_gradients(gradients, params, norm_type) if float(norm) < 0 else norm

    def is_broken(gradient: torch.Tensor, index: Any = None) -> Any:
        is_sound = norms.keep(gradient).isfinite().all()
        return ~is_sound if is_sound else has_inf_or_nan(gradient, index)

    optimizer.get_grad_norm_direct = by_rows
    if has_inf_or_nan is not None:
        optimizer._has_inf_or_nan = is_broken


def clip_if_need_be(optimizer: Any, device: Any) -> None:
    """On a CPU, leave gradients as they are that need no clipping.

    DeepSpeed (0.19.8, ZeRO-2 and 3) multiplies them by 1 then: all of them, in memory. On a GPU
    that costs less than asking for the norm would.
    """
    clip = getattr(optimizer, "unscale_and_clip_grads", None)
    if clip is None or device.type != "cpu":
        return

    def clip_large(gradients: Any, total_norm: Any) -> None:
        # -1 stands for a norm that is not finite.
        is_small = 0 <= float(total_norm) + 1e-6 <= optimizer.clip_grad
        if not (is_small and optimizer.loss_scale == 1):
            clip(gradients, total_norm)

    optimizer.unscale_and_clip_grads = clip_large


class _RowNorms:
    """Norms of rows of gradients, kept while a gradient lives and until they are taken."""

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def keep(self, gradient: torch.Tensor) -> torch.Tensor:
        norms = norms_of_rows(gradient)
        self._kept[gradient] = (gradient._version, norms)
        return norms

    def take(self, gradient: torch.Tensor) -> torch.Tensor:
        """Those that are kept, if nothing was written into the gradient since."""
        version, norms = self._kept.pop(gradient, (None, None))
        return norms if version == gradient._version else norms_of_rows(gradient)


def norms_of_rows(gradient: torch.Tensor) -> torch.Tensor:
    """Float32 norms of 4,096 neighbours each, the last of what is left: [n / 4096, rounded up]."""
    flat = gradient.detach().flatten()
    whole = flat.numel() // _ROW * _ROW
    parts = [flat[:whole].view(-1, _ROW)]
    if whole < flat.numel():
        parts.append(flat[whole:].view(1, -1))
    return torch.cat([torch.linalg.vector_norm(p, dim=1, dtype=torch.float32) for p in parts])
