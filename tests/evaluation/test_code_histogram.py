"""The picture of code use: what its pixels say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lgpt.evaluation.code_histogram import usage_histogram

BAR = (66, 115, 179)


def heights_of_bars(counts: torch.Tensor) -> np.ndarray:
    """Blue pixels in each column of the plot but the first, which the axis hides."""
    pixels = np.asarray(usage_histogram(counts))
    return (pixels == BAR).all(2).sum(0)[65:-20]


def test_bars_fall_from_the_most_used_code_and_end_where_codes_are_dead():
    counts = torch.zeros(100, dtype=torch.int64)
    counts[torch.arange(1, 50, 2)] = torch.arange(25, 0, -1) ** 2  # 25 of 100 are used
    heights = heights_of_bars(counts)
    used = np.flatnonzero(heights)
    assert used[0] == 0
    assert len(used) / len(heights) == pytest.approx(0.25, abs=0.01)
    assert (np.diff(heights[used]) <= 2).all()  # but for the line of even use, which hides a pixel


def test_the_axis_is_logarithmic():
    counts = torch.tensor([1000, 100, 10, 1])
    steps = -np.diff(heights_of_bars(counts)[[50, 200, 350, 500]])
    assert steps.max() - steps.min() <= 2


@pytest.mark.parametrize("counts", [[0, 0, 0], [5], [7] * 16384, [1, 0]])
def test_edge_cases_are_drawn(counts):
    picture = usage_histogram(torch.tensor(counts))
    assert picture.size == (640, 360)
    assert (heights_of_bars(torch.tensor(counts)) > 0).any() == (sum(counts) > 0)
