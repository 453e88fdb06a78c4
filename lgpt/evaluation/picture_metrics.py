"""How like two pictures are, and how evenly codes are used: pure functions of tensors."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def psnr_decibels(
    reconstruction: Float[Tensor, "b c H W"], images: Float[Tensor, "b c H W"]
) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each picture: 10 log10(range^2 / MSE), range 2 for [-1, 1].

    Reconstructions are clamped to [-1, 1] first, as they are when a picture is written.
    """
    error = (reconstruction.float().clamp(-1, 1) - images.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / error.clamp_min(1e-12))


def code_usage(counts: Int[Tensor, " codes"]) -> float:
    """Share of the codebook that was used at least once, 0..1."""
    return float((counts > 0).double().mean())


def code_perplexity(counts: Int[Tensor, " codes"]) -> float:
    """exp of the entropy (nats) of the code frequencies: 1 (one code) .. codebook size."""
    frequency = counts.double() / counts.sum().clamp_min(1)
    used = frequency[frequency > 0]
    return float(torch.exp(-(used * used.log()).sum()))
