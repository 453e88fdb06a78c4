"""Norms of rows stand for gradients, on CPUs, where DeepSpeed clips by their norm."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lgpt.engine import row_norms
from lgpt.engine.row_norms import clip_if_need_be, norms_of_rows, take_norms_by_rows
from lgpt.engine.start import load_deepspeed


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
    """DeepSpeed's sum in float64, -1 for what is not finite, and its own look for that."""

    def get_grad_norm_direct(self, gradients, params, norm_type=2):
        norm = torch.stack([g.double().norm(norm_type) for g in gradients]).norm(norm_type)
        return norm if norm.isfinite() else torch.tensor(-1.0)

    @staticmethod
    def _has_inf_or_nan(x, j=None):
        load_deepspeed()
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        return DeepSpeedZeroOptimizer._has_inf_or_nan(x, j)


def _by_rows() -> Any:
    optimizer = _Optimizer()
    take_norms_by_rows(optimizer, torch.device("cpu"))
    return optimizer


@pytest.mark.parametrize("largest", [1.0, 1e25, float("inf")])
def test_squares_too_large_for_float32_are_left_to_deepspeed(largest: float) -> None:
    gradients = [torch.full((5000,), 0.1), torch.full((3,), largest)]
    expected = _Optimizer().get_grad_norm_direct(gradients, gradients)
    got = _by_rows().get_grad_norm_direct(gradients, gradients)
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [1.0, 1e25, -1e25, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("size", [1, 5000])
def test_what_is_not_finite_is_found_as_deepspeed_finds_it(value: float, size: int) -> None:
    gradient = torch.ones(size)
    gradient[-1] = value
    found = torch.zeros(1)
    found += _by_rows()._has_inf_or_nan(gradient)
    assert bool(found) is bool(_Optimizer._has_inf_or_nan(gradient)) is not math.isfinite(value)
    assert not _by_rows()._has_inf_or_nan(torch.empty(0))


def test_a_gradient_is_looked_at_once_unless_it_was_written_since(monkeypatch) -> None:
    looks = []

    def look(gradient: torch.Tensor) -> torch.Tensor:
        looks.append(gradient.numel())
        return norms_of_rows(gradient)

    monkeypatch.setattr(row_norms, "norms_of_rows", look)
    optimizer = _by_rows()
    flat = torch.ones(30)
    gradients = [flat[:10].view(2, 5), flat[10:]]
    for step in (1.0, 2.0):
        flat.fill_(step)
        assert not any(optimizer._has_inf_or_nan(gradient) for gradient in gradients)
        norm = optimizer.get_grad_norm_direct(gradients, gradients)
        torch.testing.assert_close(float(norm), step * math.sqrt(30))
    assert looks == [10, 20] * 2
    assert not any(optimizer._has_inf_or_nan(gradient) for gradient in gradients)
    flat[0] = 100.0
    norm = optimizer.get_grad_norm_direct(gradients, gradients)
    torch.testing.assert_close(float(norm), math.sqrt(100.0**2 + 29 * 4))
    optimizer._has_inf_or_nan(gradients[0])
    del gradients[0]  # and what was kept of it
    flat[0] = 2.0
    assert float(optimizer.get_grad_norm_direct([flat], gradients)) == pytest.approx(120**0.5)


@pytest.mark.parametrize(
    ("norm", "limit", "scale", "is_clipped"),
    [
        (0.9, 1.0, 1.0, False),
        (1.1, 1.0, 1.0, True),
        (0.9, 0.0, 1.0, True),  # 0: no limit; DeepSpeed knows what to do
        (0.9, 1.0, 64.0, True),
        (-1.0, 1.0, 1.0, True),  # not finite
        (float("nan"), 1.0, 1.0, True),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_what_must_be_clipped_is_left_to_deepspeed(
    norm: float, limit: float, scale: float, is_clipped: bool, device: str
) -> None:
    clipped: list[Any] = []
    optimizer = SimpleNamespace(
        clip_grad=limit,
        loss_scale=scale,
        unscale_and_clip_grads=lambda gradients, norm: clipped.append(gradients),
    )
    clip_if_need_be(optimizer, torch.device(device))
    optimizer.unscale_and_clip_grads("gradients", torch.tensor(norm))
    assert clipped == (["gradients"] if is_clipped or device != "cpu" else [])
