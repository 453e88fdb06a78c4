"""The float32 gradients of ZeRO-2 on a lone rank, in memory that stays from step to step."""

from __future__ import annotations

from typing import Any

import torch

_FUNCTIONS = (
    "_build_compact_grad_partition_buffer",
    "_get_compact_grad_partition_buffer",
    "_add_to_grad_partition_buffer",
    "independent_gradient_partition_epilogue",
)


def keep_gradients(optimizer: Any) -> None:
    """Write a step's first gradients where the last step's were, on a rank that has no others.

    DeepSpeed (0.19.8, gradients in bf16 and their sums in float32) makes a vector of all gradients
    anew in every step, fills it with zeros and adds the first gradients to them: of 512M parameters
    2 GiB, which with a little bad luck are pages that the system must clear. The first gradient of
    each parameter is copied instead, and those after it are added as before: the sums are the same.
    Other optimizers stay as they are.
    """
    if not all(hasattr(optimizer, name) for name in _FUNCTIONS):
        return
    if optimizer.partition_gradients and not optimizer.cpu_offload:
        _KeptGradients(optimizer)


class _KeptGradients:
    """Its functions stand in for DeepSpeed's."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._build = optimizer._build_compact_grad_partition_buffer
        self._add_to = optimizer._add_to_grad_partition_buffer
        self._epilogue = optimizer.independent_gradient_partition_epilogue
        self._groups: dict[int, Any] = {}
        self._unwritten: dict[int, torch.Tensor] = {}  # by their addresses
        optimizer._get_compact_grad_partition_buffer = self.group
        optimizer._add_to_grad_partition_buffer = self.add
        optimizer.independent_gradient_partition_epilogue = self.end_backward

    def group(self, index: int) -> Any:
        """Of a parameter group; from a step's first call on, what they were counts no more."""
        gradients = self._optimizer.averaged_gradients
        if gradients.get(index) is None:
            if index in self._groups:
                parts = [p for p in self._groups[index] if not getattr(p, "_zero_padding", False)]
                self._unwritten.update((part.data_ptr(), part) for part in parts)
            else:
                self._groups[index] = self._build(index)
            gradients[index] = self._groups[index]
        return gradients[index]

    def add(self, total: Any, gradient: torch.Tensor) -> None:
        if total is not None and self._unwritten.pop(total.data_ptr(), None) is not None:
            total.copy_(gradient)
        else:
            self._add_to(total, gradient)

    def end_backward(self) -> None:
        """What got no gradient has zeros, as DeepSpeed has it."""
        self._epilogue()
        for part in self._unwritten.values():
            part.zero_()
        self._unwritten.clear()
