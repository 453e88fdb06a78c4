"""Losses of the two players and what balances them, as pure functions of tensors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

# taming's: keeps the ratio finite while the discriminator's gradient is still 0, and bounds it.
_LEAST_GRADIENT = 1e-4
_MOST_ADAPTIVE_WEIGHT = 1e4


def hinge_discriminator_loss(
    real: Float[Tensor, "*shape"], fake: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2 over logits.

    Source: Lim & Ye 2017, https://arxiv.org/abs/1705.02894; halved as in taming.
    """
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def hinge_generator_loss(fake: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """-mean of the logits of reconstructions."""
    return -fake.mean()


def adaptive_weight(
    picture_gradient: Float[Tensor, "*shape"], adversarial_gradient: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """How many times the adversarial term's gradient goes into the picture loss's, at most 10,000.

    |picture gradient| / (|adversarial gradient| + 1e-4), both of the decoder's last kernel.
    Source: Esser et al. 2021, eq. 7, https://arxiv.org/abs/2012.09841, and taming's code.
    """
    ratio = picture_gradient.norm() / (adversarial_gradient.norm() + _LEAST_GRADIENT)
    return ratio.clamp(0.0, _MOST_ADAPTIVE_WEIGHT)


def last_kernel_gradient(
    features: Float[Tensor, "b c H W"], output_gradient: Float[Tensor, "b 3 H W"]
) -> Float[Tensor, "3 c 3 3"]:
    """Gradient of a 3x3 kernel with padding 1, from its input and its output's gradient."""
    shape = (output_gradient.shape[1], features.shape[1], 3, 3)
    return torch.nn.grad.conv2d_weight(features.float(), shape, output_gradient, padding=1)


def lecam_penalty(
    real: Float[Tensor, "*shape"],
    fake: Float[Tensor, "*shape"],
    average_real: Float[Tensor, ""],
    average_fake: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """mean max(0, real - average fake)^2 + mean max(0, average real - fake)^2.

    Holds the discriminator back from driving its logits of both kinds ever further apart.
    Source: Tseng et al. 2021, https://arxiv.org/abs/2104.03310, and its code.
    """
    return (
        functional.relu(real - average_fake).square().mean()
        + functional.relu(average_real - fake).square().mean()
    )
