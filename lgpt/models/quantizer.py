"""Vector quantization: codes in place of latents, and how codes learn.

Shapes: B batch, h w latent grid, D code width, K codes, N = B*h*w latent vectors.
Key grammar of taming-transformers: the codebook is `embedding.weight` [K, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import numpy as np
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
        entropy_loss: See `codebook.entropy_loss`, without its weight; 0 when it is off.
    """

    latents: Float[Tensor, "batch dim h w"]
    tokens: Int[Tensor, "batch h w"]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]
    entropy_loss: Float[Tensor, ""]


class _Seen(NamedTuple):
    """Latents of one micro batch and the codes they got."""

    latents: Float[Tensor, "n dim"]
    tokens: Int[Tensor, " n"]


class VectorQuantizer(nn.Module):
    """Nearest-code quantization with a straight-through gradient.

    With `update="gradient"` the codebook is a parameter and learns from `codebook_loss`. With
    `update="ema"` it is a buffer: each code is the moving average of the latents it stands for
    (van den Oord et al. 2017, appendix A.1). The first training step lays the codes onto its own
    latents, and a code that is hardly used restarts at a random latent, so that none is dead from
    the start (RQ-VAE's `restart_unused_codes`).

    Moving averages move once an optimizer step, by the latents of the whole global batch: the
    training forwards between `begin_step` and `finish_step` only note what they saw. So the codes
    are the same, up to the rounding of sums, however many ranks and micro batches share the batch.

    Args:
        num_codes: Codebook size K.
        dim: Width D of a code.
        is_normalized: Latents and codes are scaled to unit length before the search, and the
            normalized code goes to the decoder (LlamaGen, with D = 8).
        update: "gradient" or "ema".
        ema_decay: Decay of the moving averages (only "ema").
        revive_dead_codes: Restart hardly used codes (only "ema").
        entropy_temperature: Training forwards also give the entropy loss at this temperature.
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
        entropy_temperature: Optional[float] = None,
    ) -> None:
        super().__init__()
        assert update in ("gradient", "ema"), update
        self.num_codes = num_codes
        self.is_normalized = is_normalized
        self.uses_moving_averages = update == "ema"
        self.ema_decay = ema_decay
        self.revive_dead_codes = revive_dead_codes
        self.entropy_temperature = entropy_temperature
        self._seen: list[_Seen] = []
        self._notes_latents = self.uses_moving_averages
        self.embedding = Codebook(
            num_codes, dim, is_learned=update == "gradient", is_normalized=is_normalized
        )
        if self.uses_moving_averages:
            self.register_buffer("ema_count", torch.zeros(num_codes))
            self.register_buffer("ema_sum", torch.zeros(num_codes, dim))
            self.register_buffer("is_initialized", torch.zeros((), dtype=torch.uint8))

    def forward(self, z: Float[Tensor, "batch dim h w"]) -> Quantized:
        """Quantize a latent map; in training mode with "ema" also note it for `finish_step`.

        Args:
            z: Latents, any floating type; distances and losses are float32.
        """
        batch, dim, height, width = z.shape
        with torch.autocast(device_type=z.device.type, enabled=False):
            z_ND = self._rows_of(z)
            temperature = self.entropy_temperature if self.training else None
            tokens, codes_ND, entropy_loss = self.embedding(z_ND, entropy_temperature=temperature)
            commitment_loss = functional.mse_loss(z_ND, codes_ND.detach())
            if self.uses_moving_averages:
                codebook_loss = torch.zeros_like(commitment_loss)
            else:
                codebook_loss = functional.mse_loss(codes_ND, z_ND.detach())
            latents_ND = z_ND + (codes_ND - z_ND).detach()
            if self._notes_latents and self.training:
                self._seen.append(_Seen(z_ND.detach(), tokens))
        latents = latents_ND.view(batch, height, width, dim).permute(0, 3, 1, 2)
        return Quantized(
            latents.to(z.dtype).contiguous(),
            tokens.view(batch, height, width),
            codebook_loss,
            commitment_loss,
            entropy_loss,
        )

    @torch.no_grad()
    def tokens_of(self, z: Float[Tensor, "batch dim h w"]) -> Int[Tensor, "batch h w"]:
        """The tokens alone; never moves the codes."""
        batch, _, height, width = z.shape
        return self.embedding(self._rows_of(z)).tokens.view(batch, height, width)

    def lookup(self, tokens: Int[Tensor, "batch h w"]) -> Float[Tensor, "batch dim h w"]:
        """The codes of tokens in float32, as the decoder expects them."""
        batch, height, width = tokens.shape
        codes_ND = self.embedding(tokens=tokens.reshape(-1)).codes
        return codes_ND.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()

    def begin_step(self, *, notes_latents: bool = False) -> None:
        """Forget what training forwards saw since the last `finish_step`, as a trial batch.

        Args:
            notes_latents: `drawn_latents` will be asked of this step (moving averages always note).
        """
        self._seen = []
        self._notes_latents = self.uses_moving_averages or notes_latents

    @torch.no_grad()
    def drawn_latents(self, count: int, *, seed: int, step: int) -> Float[Tensor, "count dim"]:
        """Random latents of the global batch since `begin_step`, the same on every rank.

        All ranks call it before `finish_step`. Others than those that revived codes get.
        """
        return _drawn_latents(self._seen, count, key=(seed, step, 1))

    @torch.no_grad()
    def place(self, codes: Int[Tensor, " n"], latents: Float[Tensor, "n dim"]) -> None:
        """Lay codes onto latents, with an average's share of the use; after `finish_step`.

        Only for moving averages: what codes that learn are is the optimizer's (engine/build.py).
        """
        assert self.uses_moving_averages, "a parameter has masters and moments too"
        self._restart(codes, latents)
        self.embedding.weight[codes] = latents

    @torch.no_grad()
    def finish_step(self, *, seed: int, step: int) -> int:
        """Move moving averages by all that every rank saw since `begin_step`. All ranks call it.

        Nothing happens to a codebook that learns by gradients, nor when a latent was not finite.

        Args:
            seed: With `step` decides which latents of the global batch dead codes restart at.
            step: Number of the optimizer step.

        Returns:
            How many codes restarted at a latent.
        """
        seen, self._seen = self._seen, []
        if not seen or not self.uses_moving_averages:
            return 0
        z_ND = torch.cat([each.latents for each in seen])
        sums_KD, counts_K = self._sums_over_ranks(z_ND, torch.cat([e.tokens for e in seen]))
        if not bool(torch.isfinite(sums_KD).all()):
            return 0  # the codes would never recover; the loop sees the loss or the gradient
        if not bool(self.is_initialized):
            rows_KD = _drawn_latents(seen, self.num_codes, key=(seed, step))
            fair_share = float(counts_K.sum()) / self.num_codes
            self.ema_count.fill_(fair_share)
            self.ema_sum.copy_(rows_KD * fair_share)
            self.is_initialized.fill_(1)
            revived = 0
        else:
            self.ema_sum.lerp_(sums_KD.float(), 1.0 - self.ema_decay)
            self.ema_count.lerp_(counts_K.float(), 1.0 - self.ema_decay)
            revived = self._revive(seen, seed=seed, step=step) if self.revive_dead_codes else 0
        mean_KD = self.ema_sum / self.ema_count.clamp_min(_LEAST_COUNT).unsqueeze(1)
        if self.is_normalized:
            mean_KD = functional.normalize(mean_KD, dim=1)
        is_trusted = (self.ema_count > _LEAST_COUNT).unsqueeze(1)
        self.embedding.weight.copy_(torch.where(is_trusted, mean_KD, self.embedding.weight))
        return revived

    def _rows_of(self, z: Tensor) -> Tensor:
        z_ND = z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        return functional.normalize(z_ND, dim=1) if self.is_normalized else z_ND

    def _sums_over_ranks(self, z_ND: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and number of each code's latents; in float64, so that their order hardly shows."""
        sums = z_ND.new_zeros(self.num_codes, z_ND.shape[1] + 1, dtype=torch.float64)
        with_ones = torch.cat([z_ND, z_ND.new_ones(len(z_ND), 1)], dim=1)
        sums.index_add_(0, tokens_N, with_ones.double())
        if world_size() > 1:
            dist.all_reduce(sums)
        return sums[:, :-1], sums[:, -1]

    def _revive(self, seen: list[_Seen], *, seed: int, step: int) -> int:
        fair_share = float(self.ema_count.sum()) / self.num_codes
        # The same on every rank: the counts were summed over all ranks.
        dead = (self.ema_count < _DEAD_BELOW_SHARE * fair_share).nonzero().squeeze(1)
        if len(dead) > 0:
            self._restart(dead, _drawn_latents(seen, len(dead), key=(seed, step)))
        return len(dead)

    def _restart(self, codes: Tensor, latents: Tensor) -> None:
        """Count and sum of codes as if the average use had been of these latents."""
        # Both, or the next average would pull the code back (espnet PR 6284).
        fair_share = float(self.ema_count.sum()) / self.num_codes
        self.ema_count[codes] = fair_share
        self.ema_sum[codes] = latents * fair_share

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return apply_keeping_float32_buffers(self, fn, recurse)


def _drawn_latents(seen: list[_Seen], count: int, *, key: tuple[int, ...]) -> Tensor:
    """Random latents of the global batch [count, D]: a function of it and the key.

    Its latents are numbered as training reads its pictures: micro batch by micro batch, and in it
    rank by rank (training/places.py), which is the same order for every number of ranks. Latents
    that must repeat, because there are more codes, get slight noise.
    """
    world, rank = world_size(), dist.get_rank() if world_size() > 1 else 0
    per_micro_batch = len(seen[0].latents)
    assert all(len(each.latents) == per_micro_batch for each in seen), "micro batches of one size"
    total = len(seen) * world * per_micro_batch
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
    picks = torch.randperm(total, generator=generator)[:count]
    if count > total:
        picks = torch.cat([picks, torch.randint(total, (count - total,), generator=generator)])
    micro_batch, place = picks // per_micro_batch, picks % per_micro_batch
    is_mine = micro_batch % world == rank
    mine = ((micro_batch // world) * per_micro_batch + place)[is_mine]
    z_ND = torch.cat([each.latents for each in seen])
    rows = z_ND.new_zeros(count, z_ND.shape[1])
    rows[is_mine.to(z_ND.device)] = z_ND[mine.to(z_ND.device)]
    if world > 1:
        dist.all_reduce(rows)  # each row comes from one rank, the others add nothing to it
    if count > total:
        noise = torch.randn(count - total, rows.shape[1], generator=generator)
        rows[total:] += 0.01 * rows[:total].std() * noise.to(rows.device)
    return rows
