"""Picture metrics against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from lgpt.evaluation.picture_metrics import code_perplexity, code_usage, psnr_decibels


def test_psnr_matches_the_formula_on_8_bit_values():
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (2, 3, 8, 8)).astype(np.float64)
    b = np.clip(a + generator.normal(0, 9, a.shape), 0, 255)
    mse = ((a - b) ** 2).mean(axis=(1, 2, 3))
    expected = 10 * np.log10(255**2 / mse)
    got = psnr_decibels(
        torch.from_numpy(b / 127.5 - 1).float(), torch.from_numpy(a / 127.5 - 1).float()
    )
    assert got.numpy() == pytest.approx(expected, rel=1e-4)


def test_psnr_clamps_what_a_picture_cannot_show():
    images = torch.ones(1, 3, 4, 4)
    assert float(psnr_decibels(images * 1.5, images)) == pytest.approx(
        float(psnr_decibels(images, images))
    )


def test_code_statistics_match_scipy():
    counts = torch.tensor([0, 3, 3, 1, 0, 9])
    assert code_usage(counts) == pytest.approx(4 / 6)
    assert code_perplexity(counts) == pytest.approx(
        float(np.exp(scipy.stats.entropy([3, 3, 1, 9])))
    )
    assert code_perplexity(torch.full((16,), 5)) == pytest.approx(16)
