"""The Frechet distance between two sets of features, from running sums over batches and ranks."""

from __future__ import annotations

from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lgpt.engine.ranks import sum_over_ranks


class FeatureSums:
    """Number, sum and sum of outer products of features, in float64: 34 MB for 2048 of them."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        self._outer = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._root: Optional[Tensor] = None

    def add(self, features: Float[Tensor, "b f"], is_counted: Bool[Tensor, " b"]) -> None:
        """Count rows of a batch; waits for no device."""
        wide = features.double()
        weighted = torch.where(is_counted.unsqueeze(1), wide, 0.0)
        self._root = None
        self._count += is_counted.sum()
        self._sum += weighted.sum(0)
        self._outer.addmm_(weighted.T, weighted)

    def add_over_ranks(self) -> None:
        """From now on the sums are those of all ranks; all ranks call it, once."""
        self._root = None
        for tensor in (self._count, self._sum, self._outer):
            sum_over_ranks(tensor)

    def mean_and_covariance(self) -> tuple[Float[Tensor, " f"], Float[Tensor, "f f"]]:
        """As numpy.mean and numpy.cov (divided by n - 1); needs two rows at least."""
        mean = self._sum / self._count
        return mean, (self._outer - self._count * torch.outer(mean, mean)) / (self._count - 1)

    def covariance_root(self) -> Float[Tensor, "f f"]:
        """The symmetric root of the covariance; kept, because originals are compared often."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.mean_and_covariance()[1])
            self._root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        return self._root

    def __len__(self) -> int:
        return int(self._count)


def frechet_distance(first: FeatureSums, second: FeatureSums) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), between two normal distributions.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is
    symmetric: no root of a matrix that is not, and fewer pictures than features do no harm.
    Source: Dowson & Landau 1982; Heusel et al. 2017, https://arxiv.org/abs/1706.08500.
    """
    (mean_1, covariance_1), (mean_2, covariance_2) = (
        sums.mean_and_covariance() for sums in (first, second)
    )
    root = first.covariance_root()
    product = root @ covariance_2 @ root
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace()
    return float(distance - 2 * roots.sum())
