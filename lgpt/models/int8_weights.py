"""Matrices of 8-bit numbers, for drawing alone: half of bf16's bytes to be read for every token."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 127


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to 8 bits, each output by its own scale.

    An output's largest number becomes +-127, so an error is at most 1/254 of it (symmetric absmax
    quantisation, https://arxiv.org/abs/2208.07339, section 2.1; torchao's `int8_weight_only`).

    Args:
        weight: [outputs, inputs], any floating dtype.

    Returns:
        int8 [outputs, inputs] and float32 scales [outputs]: `integers * scales[:, None]` is about
        the matrix. An output with a number that is not finite gets a scale that is not.
    """
    numbers = weight.detach().float()
    scales = numbers.abs().amax(dim=1) / _LARGEST
    # A row of zeros stays one.
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    integers = (numbers / divisors[:, None]).round().nan_to_num().clamp(-_LARGEST, _LARGEST)
    return integers.to(torch.int8), scales
