"""Losses as pure functions of tensors."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor


def reconstruction_loss(
    reconstruction: Float[Tensor, "b c H W"],
    images: Float[Tensor, "b c H W"],
    kind: Literal["l1", "l2"],
) -> Float[Tensor, ""]:
    """Mean absolute or squared error over all values, in float32, for images in [-1, 1]."""
    if kind == "l1":
        return functional.l1_loss(reconstruction.float(), images.float())
    return functional.mse_loss(reconstruction.float(), images.float())
