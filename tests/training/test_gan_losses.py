"""The players' losses against sums written out in Python, and autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lgpt.training.gan_losses import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    last_kernel_gradient,
    lecam_penalty,
)

REAL, FAKE = [2.0, 0.5, -1.0], [-2.0, 0.25, 1.0]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_hinge_losses_match_sums_by_hand():
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    by_hand = 0.5 * (mean([max(0, 1 - r) for r in REAL]) + mean([max(0, 1 + f) for f in FAKE]))
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(by_hand)
    assert float(hinge_generator_loss(fake)) == pytest.approx(-mean(FAKE))


def test_lecam_penalty_matches_a_sum_by_hand():
    by_hand = mean([max(0, r - -0.3) ** 2 for r in REAL])
    by_hand += mean([max(0, 0.4 - f) ** 2 for f in FAKE])
    averages = torch.tensor(0.4), torch.tensor(-0.3)
    got = lecam_penalty(torch.tensor(REAL), torch.tensor(FAKE), *averages)
    assert float(got) == pytest.approx(by_hand)


def test_the_adaptive_weight_is_a_ratio_with_taming_s_bounds():
    picture, adversarial = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
    assert float(adaptive_weight(picture, adversarial)) == pytest.approx(5 / 1.0001)
    assert float(adaptive_weight(picture, torch.zeros(2))) == 1e4
    assert float(adaptive_weight(torch.zeros(2), adversarial)) == 0


def test_the_last_kernel_s_gradient_is_autograd_s():
    torch.manual_seed(0)
    kernel = torch.nn.Conv2d(5, 3, 3, padding=1)
    features, weights = torch.randn(2, 5, 6, 7), torch.randn(2, 3, 6, 7)
    made = kernel(features)
    loss = (functional.silu(made) * weights).sum()
    (output_gradient,) = torch.autograd.grad(loss, made, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, kernel.weight)
    torch.testing.assert_close(last_kernel_gradient(features, output_gradient), expected)
