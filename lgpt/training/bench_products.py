"""Matrix products and convolutions of a piece of work, counted, and timed alone.

What they take alone is the least that the work can take here: its use of the device is measured by
it, as in `lgpt bench train`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from lgpt.training.bench_train_process import best_seconds


@dataclass(frozen=True)
class _Like:
    """A tensor without its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self, device: torch.device) -> Tensor:
        steps = zip(self.size, self.stride)
        count = 1 + sum(
            (length - 1) * stride for length, stride in steps
        )  # expanded ones: stride 0
        kind = torch.randn if self.dtype.is_floating_point else torch.zeros
        return kind(count, dtype=self.dtype, device=device).as_strided(self.size, self.stride)


class Products(TorchDispatchMode):
    """Notes, as a context, every operation whose floating-point operations PyTorch can count.

    Attributes:
        flops: Of all of them together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._calls: dict[str, tuple[Any, Any, Any]] = {}
        self._counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=out))
            call = (func, *tree_map(_described, (args, kwargs)))
            self._calls[repr(call)] = call
            self._counts[repr(call)] = self._counts.get(repr(call), 0) + 1
        return out

    def seconds_alone(self, device: torch.device) -> float:
        """One after the other on random numbers, each as fast as it was in a few trials."""
        total = 0.0
        for name, (func, args, kwargs) in self._calls.items():
            args, kwargs = tree_map(
                lambda value: value.made(device) if isinstance(value, _Like) else value,
                (args, kwargs),
            )
            work = lambda f=func, a=args, k=kwargs: f(*a, **k)  # noqa: E731
            total += self._counts[name] * best_seconds(work, device)
        return total


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Like(tuple(value.shape), value.stride(), value.dtype)
    return value
