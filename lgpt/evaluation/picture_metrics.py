"""How like two pictures are, and how evenly codes are used: pure functions of tensors."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

# Wang et al. 2004, section III.C.
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_K1, _SSIM_K2 = 0.01, 0.03
LEAST_SIDE_FOR_SSIM = _SSIM_WINDOW


def psnr_decibels(
    reconstruction: Float[Tensor, "b c H W"], images: Float[Tensor, "b c H W"]
) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each picture: 10 log10(range^2 / MSE), range 2 for [-1, 1].

    Reconstructions are clamped to [-1, 1] first, as they are when a picture is written.
    """
    error = (reconstruction.float().clamp(-1, 1) - images.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error.clamp_min(1e-12))


def pixel_error(
    reconstruction: Float[Tensor, "b c H W"],
    images: Float[Tensor, "b c H W"],
    kind: Literal["l1", "l2"],
) -> Float[Tensor, " b"]:
    """Mean absolute or squared error of each picture in [-1, 1], in float32; nothing is clamped."""
    error = reconstruction.float() - images.float()
    return (error.abs() if kind == "l1" else error.square()).flatten(1).mean(1)


def ssim(
    reconstruction: Float[Tensor, "b c H W"], images: Float[Tensor, "b c H W"]
) -> Float[Tensor, " b"]:
    """Structural similarity of each picture, 1 where both are equal: means over places and colours.

    Gaussian window of 11x11 pixels and sigma 1.5, where it fits whole; K1 0.01, K2 0.03. Measured
    on values in [0, 1] with range 1: the mean brightness counts, so [-1, 1] with range 2 would give
    something else. (LlamaGen takes range 2 in [0, 1], which gives 0.675 for 0.54.)
    Source: Wang et al. 2004, eq. 13, https://doi.org/10.1109/TIP.2003.819861.

    Args:
        reconstruction: Clamped to [-1, 1] first.
        images: In [-1, 1]; sides of at least 11.
    """
    first, second = (reconstruction.float().clamp(-1, 1) + 1) / 2, (images.float() + 1) / 2
    batch, channels, height, width = first.shape
    maps = torch.cat([first, second, first * first, second * second, first * second])
    means = _gaussian_means(maps.reshape(-1, 1, height, width)).unflatten(0, (5, batch, channels))
    mean_1, mean_2 = means[0], means[1]
    variance_1, variance_2 = means[2] - mean_1.square(), means[3] - mean_2.square()
    covariance = means[4] - mean_1 * mean_2
    c1, c2 = _SSIM_K1**2, _SSIM_K2**2
    similarity = ((2 * mean_1 * mean_2 + c1) * (2 * covariance + c2)) / (
        (mean_1.square() + mean_2.square() + c1) * (variance_1 + variance_2 + c2)
    )
    return similarity.flatten(1).mean(1)


def _gaussian_means(maps: Tensor) -> Tensor:
    places = torch.arange(_SSIM_WINDOW, device=maps.device) - _SSIM_WINDOW // 2
    window = torch.exp(-places.float().square() / (2 * _SSIM_SIGMA**2))
    window = window / window.sum()
    means = functional.conv2d(maps, window.view(1, 1, 1, -1))
    return functional.conv2d(means, window.view(1, 1, -1, 1)).squeeze(1)


def code_usage(counts: Int[Tensor, " codes"]) -> float:
    """Share of the codebook that was used at least once, 0..1."""
    return float((counts > 0).double().mean())


def code_perplexity(counts: Int[Tensor, " codes"]) -> float:
    """exp of the entropy (nats) of the code frequencies: 1 (one code) .. codebook size."""
    frequency = counts.double() / counts.sum().clamp_min(1)
    used = frequency[frequency > 0]
    return float(torch.exp(-(used * used.log()).sum()))
