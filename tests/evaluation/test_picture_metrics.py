"""Picture metrics against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from lgpt.evaluation.picture_metrics import (
    code_perplexity,
    code_usage,
    pixel_error,
    psnr_decibels,
    ssim,
)


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


def slow_ssim(first: np.ndarray, second: np.ndarray, data_range: float) -> float:
    """One picture, window by window, as Wang et al. 2004 write it; mean over places and colours."""
    places = np.arange(11) - 5.0
    window = np.exp(-(places[:, None] ** 2 + places[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    found = []
    for a, b in zip(first, second):
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                x, y = (p[top : top + 11, left : left + 11] for p in (a, b))
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                variance_x = (window * (x - mean_x) ** 2).sum()
                variance_y = (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                found.append(
                    (2 * mean_x * mean_y + c1)
                    * (2 * covariance + c2)
                    / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
                )
    return float(np.mean(found))


def two_pictures() -> tuple[np.ndarray, np.ndarray]:
    """Smooth ones with values in [0, 1], and the same with noise of different strength."""
    generator = np.random.default_rng(3)
    smooth = scipy.ndimage.gaussian_filter(generator.random((2, 3, 23, 19)), (0, 0, 2, 2))
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    noise = generator.normal(0, 1, smooth.shape) * np.array([0.03, 0.2])[:, None, None, None]
    return smooth, np.clip(smooth + noise, 0, 1)


def test_ssim_matches_the_paper_s_formula_window_by_window():
    """scikit-image 0.26 gives these figures too, to 1e-6, with gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False and data_range=1 on the same pictures."""
    images, noisy = two_pictures()
    got = ssim(*(torch.from_numpy(2 * p - 1).float() for p in (noisy, images)))
    expected = [slow_ssim(n, i, data_range=1.0) for n, i in zip(noisy, images)]
    assert got.numpy() == pytest.approx(expected, abs=1e-5)
    assert expected[0] > 0.9 > 0.7 > expected[1], "one good and one bad picture"


def test_ssim_is_not_inflated_as_with_a_range_of_2_on_pictures_in_0_to_1():
    images, noisy = two_pictures()
    got = float(ssim(*(torch.from_numpy(2 * p[1:] - 1).float() for p in (noisy, images))))
    inflated = slow_ssim(noisy[1], images[1], data_range=2.0)
    assert inflated > 1.1 * got


def test_ssim_of_equal_pictures_is_1_and_clamps_what_a_picture_cannot_show():
    images = torch.from_numpy(2 * two_pictures()[0] - 1).float()
    assert ssim(images, images).numpy() == pytest.approx(1.0, abs=1e-6)
    bright = images.clone()
    bright[:, :, :12] = 1.0
    shown = ssim(bright, images)
    bright[:, :, :12] = 1.7
    assert torch.equal(ssim(bright, images), shown)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_pixel_errors_average_to_torch_s_loss(kind):
    images, noisy = (torch.from_numpy(p).float() for p in two_pictures())
    loss = {"l1": torch.nn.functional.l1_loss, "l2": torch.nn.functional.mse_loss}[kind]
    got = pixel_error(noisy, images, kind)
    assert got.shape == (2,)
    assert float(got.mean()) == pytest.approx(float(loss(noisy, images)), rel=1e-6)
