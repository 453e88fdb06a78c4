"""Losses against numbers done by hand."""

from __future__ import annotations

import pytest
import torch

from lgpt.training.losses import reconstruction_loss


def test_reconstruction_losses_are_means_in_float32():
    a, b = torch.full((1, 3, 2, 2), 0.5).bfloat16(), torch.zeros(1, 3, 2, 2).bfloat16()
    assert reconstruction_loss(a, b, "l1").dtype == torch.float32
    assert float(reconstruction_loss(a, b, "l1")) == pytest.approx(0.5)
    assert float(reconstruction_loss(a, b, "l2")) == pytest.approx(0.25)
