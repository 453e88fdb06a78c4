"""The nearest training picture, against a search that compares every pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lgpt.evaluation.nearest import (
    Nearest,
    compared_with_held_out,
    cosines,
    shares_of_equal_tokens,
)


def test_the_nearest_by_tokens_is_the_one_that_comparing_all_pairs_finds():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(4, (5, 12), generator=generator)
    training = torch.randint(4, (30, 2, 12), generator=generator)  # two crops each
    nearest = Nearest(5)
    for items in np.array_split(np.arange(30), 4):
        for crop in range(2):
            nearest.update(shares_of_equal_tokens(drawn, training[items, crop]), items, crop)
    for row in range(5):
        equal = [
            (sum(int(a == b) for a, b in zip(drawn[row], training[item, crop])) / 12, item, crop)
            for item in range(30)
            for crop in range(2)
        ]
        best = max(share for share, _, _ in equal)
        assert nearest.scores[row] == pytest.approx(best)
        found = (nearest.scores[row], int(nearest.items[row]), int(nearest.crops[row]))
        assert found[1:] in [(item, crop) for share, item, crop in equal if share == best]


def test_cosines_are_those_of_scipy():
    from scipy.spatial.distance import cdist

    a, b = torch.randn(3, 8), torch.randn(6, 8)
    unit = [each / each.norm(dim=1, keepdim=True) for each in (a, b)]
    assert np.allclose(cosines(*unit), 1 - cdist(a, b, "cosine"), atol=1e-6)


def test_only_what_is_nearer_than_every_held_out_picture_is_counted():
    figures = compared_with_held_out(np.array([0.1, 0.5, 0.7, 1.0]), np.array([0.2, 0.5]))
    assert figures["nearer_than_held_out"] == 2
    assert (figures["median"], figures["largest"]) == (pytest.approx(0.6), 1.0)
    assert (figures["held_out_median"], figures["held_out_largest"]) == (pytest.approx(0.35), 0.5)
