"""Products of a piece of work, against PyTorch's own counter of floating-point operations."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lgpt.training import bench_products
from lgpt.training.bench_products import Products

CPU = torch.device("cpu")


def _flops_of(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _train_a_little() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*layers, nn.Conv2d(8, 8, 1)).to(memory_format=torch.channels_last)
    pictures: Tensor = model(torch.randn(2, 3, 16, 16))
    # The mean's gradient is one number, expanded; 49 places times 8 channels into 5.
    (pictures.mean() + (pictures.flatten(2).mT @ torch.randn(8, 5)).square().mean()).backward()


def test_all_that_torch_counts_is_counted_forward_and_backward():
    with Products() as products:
        _train_a_little()
    assert products.flops == _flops_of(_train_a_little) > 0


def test_alone_the_same_products_run_again_as_often(monkeypatch: pytest.MonkeyPatch):
    with Products() as products:
        _train_a_little()
    runs: list[int] = []

    def best_seconds(work: Callable[[], Any], device: torch.device) -> float:
        runs.append(_flops_of(work))
        return float(runs[-1])

    monkeypatch.setattr(bench_products, "best_seconds", best_seconds)
    assert products.seconds_alone(CPU) == products.flops
    assert sum(runs) < products.flops  # the two equal convolutions were timed once


def test_what_is_made_again_has_the_shape_order_and_type():
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    expanded = torch.randn(3, 1).to(torch.bfloat16).expand(3, 4)
    for tensor in (channels_last, expanded, torch.arange(6).view(2, 3)[:, 1:], torch.tensor(1.0)):
        made = bench_products._described(tensor).made(CPU)
        assert (made.shape, made.stride(), made.dtype) == (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )


def test_seconds_are_those_of_a_clock():
    with Products() as products:
        torch.randn(300, 400) @ torch.randn(400, 500)
    assert products.flops == 2 * 300 * 400 * 500
    assert 0 < products.seconds_alone(CPU) < 10
