"""8-bit matrices: how far from the numbers, and what happens to odd ones."""

from __future__ import annotations

import pytest
import torch

from lgpt.models.int8_weights import to_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_within_half_a_step_and_the_largest_is_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Outputs of very different sizes: each has its own scale.
    weight = (torch.randn(7, 100) * torch.logspace(-20, 20, 7)[:, None]).to(dtype)
    integers, scales = to_int8(weight)
    assert (integers.dtype, scales.dtype) == (torch.int8, torch.float32)
    numbers = weight.double()
    error = (integers.double() * scales.double()[:, None] - numbers).abs()
    assert (error <= scales.double()[:, None] * 0.5001).all()
    largest = numbers.abs().argmax(dim=1, keepdim=True)
    assert (integers.gather(1, largest).abs() == 127).all()
    assert torch.equal(to_int8(-weight)[0], -integers)  # symmetric


def test_zeros_stay_and_what_is_not_finite_is_not_hidden() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("-inf"), 1.0], [3.0, -1.5]])
    integers, scales = to_int8(weight)
    products = (integers * torch.ones(2)).sum(dim=1) * scales
    assert products[0] == 0
    assert not products[1:3].isfinite().any()
    assert integers[3].tolist() == [127, -64]
