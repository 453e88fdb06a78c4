"""How well pictures come back through a VQ-VAE: sums over pictures and ranks, then the figures."""

from __future__ import annotations

from typing import Literal, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lgpt.engine.ranks import sum_over_ranks
from lgpt.evaluation.frechet import FeatureSums, frechet_distance
from lgpt.evaluation.judges import NO_JUDGES, Judges
from lgpt.evaluation.picture_metrics import (
    LEAST_SIDE_FOR_SSIM,
    code_perplexity,
    code_usage,
    pixel_error,
    psnr_decibels,
    ssim,
)
from lgpt.models.inception import FEATURES


class ReconstructionScores:
    """Sums over the pictures that this rank was shown, on the device; figures over all ranks' ones.

    Every picture counts the same, whatever batch and rank it was in, so the figures depend neither
    on the number of ranks nor on the micro batch, but for the rounding of the network itself. Until
    `over_ranks` nothing waits for the device.

    Args:
        num_codes: Codebook size.
        device: Where pictures and sums are.
        loss: What `recon_loss` is.
        judges: What measures lpips and rfid; without them these are not measured.
        originals: Inception's features of the same pictures over all ranks, from `originals` of
            scores before; they are measured where it is None.

    Attributes:
        originals: After `over_ranks` those of all ranks' pictures; None without Inception.
    """

    def __init__(
        self,
        num_codes: int,
        device: torch.device,
        *,
        loss: Literal["l1", "l2"],
        judges: Judges = NO_JUDGES,
        originals: Optional[FeatureSums] = None,
    ) -> None:
        self._loss: Literal["l1", "l2"] = loss
        self._judges = judges
        self._is_known, self.originals = originals is not None, originals
        self._features: Optional[FeatureSums] = None
        if judges.inception is not None:
            self._features = FeatureSums(FEATURES, device)
            if originals is None:
                self.originals = FeatureSums(FEATURES, device)
        self._code_counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self._sums: dict[str, Tensor] = {}
        self._pictures = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        images: Float[Tensor, "b 3 H W"],
        reconstruction: Float[Tensor, "b 3 H W"],
        tokens: Int[Tensor, "b h w"],
        is_counted: Bool[Tensor, " b"],
    ) -> dict[str, Tensor]:
        """Count a batch; its figures picture by picture.

        Args:
            images: In [-1, 1], float32.
            reconstruction: Not clamped.
            tokens: Of these pictures.
            is_counted: False for pictures that only fill the batch up.
        """
        values = {
            "recon_loss": pixel_error(reconstruction, images, self._loss),
            "psnr_db": psnr_decibels(reconstruction, images),
        }
        if min(images.shape[-2:]) >= LEAST_SIDE_FOR_SSIM:
            values["ssim"] = ssim(reconstruction, images)
        if self._judges.lpips is not None:
            values["lpips"] = self._judges.lpips(reconstruction.float().clamp(-1, 1), images)
        for name, of_picture in values.items():
            counted = torch.where(is_counted, of_picture.double(), 0.0)
            self._sums[name] = self._sums.get(name, 0.0) + counted.sum()
        self._pictures += is_counted.sum()
        # Not bincount: on a GPU it waits for the largest token.
        times = is_counted.view(-1, 1, 1).expand_as(tokens).reshape(-1).to(torch.int64)
        self._code_counts.index_add_(0, tokens.reshape(-1), times)
        self._add_features(images, reconstruction, is_counted)
        return values

    def _add_features(self, images: Tensor, reconstruction: Tensor, is_counted: Tensor) -> None:
        inception = self._judges.inception
        if inception is None:
            return
        assert self._features is not None
        assert self.originals is not None
        self._features.add(inception(reconstruction), is_counted)
        if not self._is_known:
            self.originals.add(inception(images), is_counted)

    def over_ranks(self) -> dict[str, float]:
        """The figures over all ranks' pictures; all ranks call it, once, and get the same.

        Returns:
            recon_loss, psnr_db, ssim and lpips (means over pictures), rfid, codebook_usage (0..1),
            perplexity and dead_codes (never used in these pictures).
        """
        sum_over_ranks(self._code_counts)
        packed = sum_over_ranks(torch.stack([self._pictures, *self._sums.values()])).tolist()
        counts = self._code_counts.cpu()
        return {
            **{name: total / packed[0] for name, total in zip(self._sums, packed[1:])},
            **self._rfid(),
            "codebook_usage": code_usage(counts),
            "perplexity": code_perplexity(counts),
            "dead_codes": float((counts == 0).sum()),
        }

    def _rfid(self) -> dict[str, float]:
        if self._features is None or self.originals is None:
            return {}
        self._features.add_over_ranks()
        if not self._is_known:
            self.originals.add_over_ranks()
        if len(self._features) < 2:
            return {}  # one picture has no covariance
        return {"rfid": frechet_distance(self.originals, self._features)}

    @property
    def code_counts(self) -> Int[Tensor, " codes"]:
        """How often each code was used: by all ranks after `over_ranks`."""
        return self._code_counts
