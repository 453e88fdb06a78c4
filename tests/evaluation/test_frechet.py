"""Frechet distance from running sums against numpy's covariance and scipy's matrix root."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from lgpt.evaluation.frechet import FeatureSums, frechet_distance

WIDTH = 24


def features(count: int, seed: int) -> np.ndarray:
    """Correlated, of different scales and far from 0, as a network's are."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(0, 1, (WIDTH, WIDTH)) * np.geomspace(0.01, 3, WIDTH)
    return generator.normal(0, 1 + 0.1 * seed, (count, WIDTH)) @ mixing + 5 + 0.1 * seed


def sums_of(rows: np.ndarray, batch: int = 7) -> FeatureSums:
    sums = FeatureSums(WIDTH, torch.device("cpu"))
    for part in torch.from_numpy(rows).float().split(batch):
        sums.add(part, torch.ones(len(part), dtype=torch.bool))
    return sums


def by_scipy(first: np.ndarray, second: np.ndarray) -> float:
    """pytorch-fid's formula."""
    (m1, c1), (m2, c2) = ((rows.mean(0), np.cov(rows, rowvar=False)) for rows in (first, second))
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root.real))


def test_distance_matches_numpy_and_scipy():
    first, second = features(300, 0), features(200, 1)
    wanted = by_scipy(first, second)
    assert wanted > 1
    got = frechet_distance(sums_of(first), sums_of(second))
    assert got == pytest.approx(wanted, rel=1e-5)
    assert frechet_distance(sums_of(second), sums_of(first)) == pytest.approx(got, rel=1e-6)


def test_fewer_rows_than_features_are_no_harm():
    first, second = features(9, 0), features(11, 1)
    got = frechet_distance(sums_of(first), sums_of(second))
    assert got == pytest.approx(by_scipy(first, second), rel=1e-4)


def test_a_set_is_at_no_distance_from_itself_in_another_order():
    rows = features(100, 0)
    scale = np.trace(np.cov(rows, rowvar=False))
    assert abs(frechet_distance(sums_of(rows), sums_of(rows[::-1].copy(), 13))) < 1e-6 * scale


def test_rows_that_only_fill_up_do_not_count():
    rows = features(40, 0)
    rows[35] = np.nan
    wanted = sums_of(rows[:30])
    sums = FeatureSums(WIDTH, torch.device("cpu"))
    sums.add(torch.from_numpy(rows).float(), torch.arange(40) < 30)
    assert len(sums) == len(wanted) == 30
    for mine, theirs in zip(sums.mean_and_covariance(), wanted.mean_and_covariance()):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
