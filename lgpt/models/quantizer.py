"""Vector quantization: codes in place of latents, and how codes learn.

Shapes: B batch, h w latent grid, D code width, K codes, N = B*h*w latent vectors.
Key grammar of taming-transformers: the codebook is `embedding.weight` [K, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lgpt.models.codebook import Codebook, apply_keeping_float32_buffers, world_size

# A code with less than this share of the average use restarts at a latent of the batch.
_DEAD_BELOW_SHARE = 0.1
# Below this moving count the mean sum / count is no longer trusted and the code stays where it is.
_LEAST_COUNT = 1e-6


class Quantized(NamedTuple):
    """What the quantizer makes of a latent map.

    Attributes:
        latents: Codes in place of the latents; the gradient goes straight through to the latents.
        tokens: Code indices, row-major over the latent grid.
        codebook_loss: Mean squared distance that moves codes to latents (0 for moving averages).
        commitment_loss: The same distance moving latents to codes, without its weight beta.
    """

    latents: Float[Tensor, "batch dim h w"]
    tokens: Int[Tensor, "batch h w"]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]


class VectorQuantizer(nn.Module):
    """Nearest-code quantization with a straight-through gradient.

    With `update="gradient"` the codebook is a parameter and learns from `codebook_loss`. With
    `update="ema"` it is a buffer: each code is the moving average of the latents it stands for,
    over all ranks (van den Oord et al. 2017, appendix A.1). The first training batch lays the codes
    onto its own latents, and a code that is hardly used restarts at a random latent, so that none
    is dead from the start (RQ-VAE's `restart_unused_codes`).

    Args:
        num_codes: Codebook size K.
        dim: Width D of a code.
        is_normalized: Latents and codes are scaled to unit length before the search, and the
            normalized code goes to the decoder (LlamaGen, with D = 8).
        update: "gradient" or "ema".
        ema_decay: Decay of the moving averages (only "ema").
        revive_dead_codes: Restart hardly used codes (only "ema").
    """

    ema_count: Tensor
    ema_sum: Tensor
    is_initialized: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        is_normalized: bool = False,
        update: str = "gradient",
        ema_decay: float = 0.99,
        revive_dead_codes: bool = True,
    ) -> None:
        super().__init__()
        assert update in ("gradient", "ema"), update
        self.num_codes = num_codes
        self.is_normalized = is_normalized
        self.uses_moving_averages = update == "ema"
        self.ema_decay = ema_decay
        self.revive_dead_codes = revive_dead_codes
        self.embedding = Codebook(
            num_codes, dim, is_learned=update == "gradient", is_normalized=is_normalized
        )
        if self.uses_moving_averages:
            self.register_buffer("ema_count", torch.zeros(num_codes))
            self.register_buffer("ema_sum", torch.zeros(num_codes, dim))
            self.register_buffer("is_initialized", torch.zeros((), dtype=torch.uint8))

    def forward(self, z: Float[Tensor, "batch dim h w"]) -> Quantized:
        """Quantize a latent map; in training mode with "ema" also move the codes.

        Args:
            z: Latents, any floating type; distances and losses are float32.
        """
        batch, dim, height, width = z.shape
        with torch.autocast(device_type=z.device.type, enabled=False):
            z_ND = z.float().permute(0, 2, 3, 1).reshape(-1, dim)
            if self.is_normalized:
                z_ND = functional.normalize(z_ND, dim=1)
            is_updating = self.uses_moving_averages and self.training
            if is_updating and not bool(self.is_initialized):
                self._lay_codes_onto(z_ND.detach())
            tokens, codes_ND = self.embedding(z_ND)
            commitment_loss = functional.mse_loss(z_ND, codes_ND.detach())
            if self.uses_moving_averages:
                codebook_loss = torch.zeros_like(commitment_loss)
            else:
                codebook_loss = functional.mse_loss(codes_ND, z_ND.detach())
            latents_ND = z_ND + (codes_ND - z_ND).detach()
            if is_updating:
                self._follow(z_ND.detach(), tokens)
        latents = latents_ND.view(batch, height, width, dim).permute(0, 3, 1, 2)
        return Quantized(
            latents.to(z.dtype).contiguous(),
            tokens.view(batch, height, width),
            codebook_loss,
            commitment_loss,
        )

    @torch.no_grad()
    def tokens_of(self, z: Float[Tensor, "batch dim h w"]) -> Int[Tensor, "batch h w"]:
        """The tokens alone; never moves the codes."""
        batch, dim, height, width = z.shape
        z_ND = z.float().permute(0, 2, 3, 1).reshape(-1, dim)
        if self.is_normalized:
            z_ND = functional.normalize(z_ND, dim=1)
        return self.embedding(z_ND)[0].view(batch, height, width)

    def lookup(self, tokens: Int[Tensor, "batch h w"]) -> Float[Tensor, "batch dim h w"]:
        """The codes of tokens in float32, as the decoder expects them."""
        batch, height, width = tokens.shape
        codes_ND = self.embedding(tokens=tokens.reshape(-1))[1]
        return codes_ND.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def _lay_codes_onto(self, z_ND: Tensor) -> None:
        rows_KD = _rows_of_first_rank(z_ND, self.num_codes)
        fair_share = z_ND.shape[0] * world_size() / self.num_codes
        self.embedding.weight.copy_(
            functional.normalize(rows_KD, dim=1) if self.is_normalized else rows_KD
        )
        self.ema_count.fill_(fair_share)
        self.ema_sum.copy_(self.embedding.weight * fair_share)
        self.is_initialized.fill_(1)

    @torch.no_grad()
    def _follow(self, z_ND: Tensor, tokens_N: Tensor) -> None:
        dim = z_ND.shape[1]
        batch_sums = z_ND.new_zeros(self.num_codes, dim + 1)  # the last column counts
        batch_sums.index_add_(0, tokens_N, torch.cat([z_ND, z_ND.new_ones(len(z_ND), 1)], dim=1))
        if world_size() > 1:
            dist.all_reduce(batch_sums)
        self.ema_sum.lerp_(batch_sums[:, :dim], 1.0 - self.ema_decay)
        self.ema_count.lerp_(batch_sums[:, dim], 1.0 - self.ema_decay)
        if self.revive_dead_codes:
            self._revive(z_ND)
        mean_KD = self.ema_sum / self.ema_count.clamp_min(_LEAST_COUNT).unsqueeze(1)
        if self.is_normalized:
            mean_KD = functional.normalize(mean_KD, dim=1)
        is_trusted = (self.ema_count > _LEAST_COUNT).unsqueeze(1)
        self.embedding.weight.copy_(torch.where(is_trusted, mean_KD, self.embedding.weight))

    def _revive(self, z_ND: Tensor) -> None:
        fair_share = float(self.ema_count.sum()) / self.num_codes
        # The same on every rank: the counts were summed over all ranks.
        dead = (self.ema_count < _DEAD_BELOW_SHARE * fair_share).nonzero().squeeze(1)
        if len(dead) == 0:
            return
        # Count and sum restart too, or the next average would pull the code back (espnet PR 6284).
        self.ema_count[dead] = fair_share
        self.ema_sum[dead] = _rows_of_first_rank(z_ND, len(dead)) * fair_share

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return apply_keeping_float32_buffers(self, fn, recurse)


def _rows_of_first_rank(z_ND: Tensor, count: int) -> Tensor:
    """Random latents of rank 0, the same on every rank; with slight noise if they must repeat."""
    available = z_ND.shape[0]
    picks = torch.randperm(available, device=z_ND.device)[:count]
    rows = z_ND[picks]
    if available < count:
        repeats = torch.randint(available, (count - available,), device=z_ND.device)
        noise = torch.randn(count - available, z_ND.shape[1], device=z_ND.device)
        rows = torch.cat([rows, z_ND[repeats] + 0.01 * z_ND.std() * noise])
    if world_size() > 1:
        dist.broadcast(rows, src=0)
    return rows
