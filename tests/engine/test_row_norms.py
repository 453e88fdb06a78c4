"""Norms of rows stand for gradients, on CPUs, where DeepSpeed clips by their norm."""

from __future__ import annotations

import pytest
import torch

from lgpt.engine.row_norms import norms_of_rows, take_norms_by_rows


@pytest.mark.parametrize("shape", [(1,), (4095,), (4096,), (64, 64), (3, 5000), (3000, 2000)])
def test_norm_of_row_norms_is_the_norm_in_float64(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(shape) * 1e-4
    rows = norms_of_rows(gradient)
    assert (rows.dtype, rows.numel()) == (torch.float32, -(-gradient.numel() // 4096))
    expected = torch.linalg.vector_norm(gradient.double())
    got = torch.linalg.vector_norm(rows.double())
    tolerance = 1e-6 if gradient.numel() < 9000 else 3e-8
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)


def test_row_norms_are_float32_and_broken_gradients_stay_broken() -> None:
    gradient = torch.randn(5000).bfloat16()
    expected = torch.linalg.vector_norm(gradient.double())
    torch.testing.assert_close(
        torch.linalg.vector_norm(norms_of_rows(gradient).double()), expected, rtol=1e-6, atol=0
    )
    for broken in (float("nan"), float("inf")):
        gradient = torch.ones(10000)
        gradient[7] = broken
        assert not bool(norms_of_rows(gradient).isfinite().all())


class _Optimizer:
    """DeepSpeed's sum in float64, and -1 for what is not finite."""

    def get_grad_norm_direct(self, gradients, params, norm_type=2):
        norm = torch.stack([g.double().norm(norm_type) for g in gradients]).norm(norm_type)
        return norm if norm.isfinite() else torch.tensor(-1.0)


@pytest.mark.parametrize("largest", [1.0, 1e25, float("inf")])
def test_squares_too_large_for_float32_are_left_to_deepspeed(largest: float) -> None:
    gradients = [torch.full((5000,), 0.1), torch.full((3,), largest)]
    expected = _Optimizer().get_grad_norm_direct(gradients, gradients)
    optimizer = _Optimizer()
    take_norms_by_rows(optimizer, torch.device("cpu"))
    got = optimizer.get_grad_norm_direct(gradients, gradients)
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=0)
