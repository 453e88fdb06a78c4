"""Which training picture each of some pictures is most like, by tokens or by embeddings.

Shapes: N pictures that are looked up, n training pictures at a time, L tokens, E embedding width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class Nearest:
    """The best match of every picture so far, filled a piece of the training set at a time.

    Attributes:
        scores: Of the best match; -inf before the first piece.
        items: Which training picture it is.
        crops: Which crop of it.
    """

    def __init__(self, pictures: int) -> None:
        self.scores = np.full(pictures, -np.inf)
        self.items = np.full(pictures, -1, dtype=np.int64)
        self.crops = np.full(pictures, -1, dtype=np.int64)

    def update(self, scores_Nn: Float[Tensor, "N n"], items_n: np.ndarray, crop: int) -> None:
        """Compare with crop `crop` of these training pictures; of equals the first one stays."""
        best, place = scores_Nn.double().cpu().max(dim=1)
        better = best.numpy() > self.scores
        self.scores[better] = best.numpy()[better]
        self.items[better] = items_n[place.numpy()[better]]
        self.crops[better] = crop


def shares_of_equal_tokens(
    pictures_NL: Int[Tensor, "N L"], training_nL: Int[Tensor, "n L"]
) -> Float[Tensor, "N n"]:
    """Share of places at which two pictures have the same token, 0..1."""
    shares = [(row == training_nL).float().mean(dim=1) for row in pictures_NL]
    return torch.stack(shares)


def cosines(
    pictures_NE: Float[Tensor, "N E"], training_nE: Float[Tensor, "n E"]
) -> Float[Tensor, "N n"]:
    """Cosine similarities of embeddings of unit length, -1..1."""
    return pictures_NE @ training_nE.t()


def compared_with_held_out(scores: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """How near drawn pictures come, beside pictures that training cannot have copied.

    Args:
        scores: Nearest match in the training set of every drawn picture.
        held_out: The same of real validation pictures.

    Returns:
        `median` and `largest` of both, and `nearer_than_held_out`: how many drawn pictures are
        nearer to a training picture than every validation picture is.
    """
    return {
        "median": float(np.median(scores)),
        "largest": float(scores.max()),
        "held_out_median": float(np.median(held_out)),
        "held_out_largest": float(held_out.max()),
        "nearer_than_held_out": int((scores > held_out.max()).sum()),
    }
