"""The code vectors: the search for the nearest one, and how evenly latents choose among them.

Shapes: B batch, h w latent grid, D code width, K codes, N = B*h*w latent vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Distances are built for so many pairs at a time (2^25 float32 = 128 MiB).
_MAX_DISTANCES = 1 << 25
_LOG_EPS = 1e-5  # the reference's, under the logarithm of the mean probabilities


@torch.no_grad()
def nearest_codes(
    z: Float[Tensor, "batch dim h w"], codebook: Float[Tensor, "codes dim"]
) -> Int[Tensor, "batch h w"]:
    """Index of the closest code for every latent vector.

    Squared Euclidean distance as |e|^2 - 2 z.e (|z|^2 is the same for every code), so no
    (batch*h*w, codes, dim) tensor is built; in float32 even under bf16, because the subtraction
    cancels. Source: van den Oord et al. 2017, eq. 1, https://arxiv.org/abs/1711.00937.

    Args:
        z: Encoder output, before the straight-through step.
        codebook: Code vectors, one per row.

    Returns:
        Code indices, row-major over the latent grid.
    """
    batch, dim, height, width = z.shape
    z_ND = z.float().permute(0, 2, 3, 1).reshape(-1, dim)
    return _nearest_rows(z_ND, codebook.float()).view(batch, height, width)


def _nearest_rows(z_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    with torch.autocast(device_type=z_ND.device.type, enabled=False):
        squared_K = codebook_KD.square().sum(dim=1)
        parts = [
            torch.addmm(squared_K, part, codebook_KD.t(), alpha=-2.0).argmin(dim=1)
            for part in z_ND.split(_rows_at_a_time(codebook_KD))
        ]
    return torch.cat(parts)


def _rows_at_a_time(codebook_KD: Tensor) -> int:
    return max(1, _MAX_DISTANCES // codebook_KD.shape[0])


def entropy_loss(
    z_ND: Float[Tensor, "n dim"], codebook_KD: Float[Tensor, "codes dim"], temperature: float
) -> Float[Tensor, ""]:
    """mean_n H(p_n) - H(mean_n p_n), in nats: every latent sure of its code, all codes in use.

    p_n = softmax_k(-|z_n - e_k|^2 / temperature). The mean probabilities are those of this call's
    latents on all ranks; with gradient accumulation, those of one micro batch of every rank.
    Source: MAGVIT-v2, eq. 5, https://arxiv.org/abs/2310.05737, as IBQ weighs it (0.05, temperature
    0.01), https://arxiv.org/abs/2412.02692; distances in place of IBQ's products z.e, because here
    the nearest code is chosen.

    Args:
        z_ND: Latents; the gradient reaches them.
        codebook_KD: Code vectors; the gradient reaches them too.
        temperature: Of the soft choice; small is sharp.
    """
    parts = z_ND.split(_rows_at_a_time(codebook_KD))
    # A logit is built twice rather than kept when there are too many for one piece.
    sums = [
        _entropy_sums(part, codebook_KD, temperature)
        if len(parts) == 1
        else checkpoint(_entropy_sums, part, codebook_KD, temperature, use_reentrant=False)
        for part in parts
    ]
    mean_K = torch.stack([probabilities for probabilities, _ in sums]).sum(0) / len(z_ND)
    if world_size() > 1:
        over_ranks_K = mean_K.detach().clone()
        dist.all_reduce(over_ranks_K)
        # The gradient through this rank's own share is whole once gradients are averaged.
        mean_K = mean_K + (over_ranks_K / world_size() - mean_K).detach()
    sample_entropy = torch.stack([entropies for _, entropies in sums]).sum() / len(z_ND)
    return sample_entropy + (mean_K * (mean_K + _LOG_EPS).log()).sum()


def _entropy_sums(z_ND: Tensor, codebook_KD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sums over the latents: of their probabilities [K], and of their entropies."""
    squared_K = codebook_KD.square().sum(dim=1)
    # |z|^2 is missing: it is the same for all codes, so the softmax does not see it.
    logits_NK = torch.addmm(squared_K, z_ND, codebook_KD.t(), alpha=-2.0) / -temperature
    log_probabilities_NK = logits_NK.log_softmax(dim=1)
    probabilities_NK = log_probabilities_NK.exp()
    return probabilities_NK.sum(0), -(probabilities_NK * log_probabilities_NK).sum()


class Found(NamedTuple):
    """What one look into the codebook gives.

    Attributes:
        tokens: Code indices.
        codes: Their vectors in float32, as the decoder expects them.
        entropy_loss: See `entropy_loss`; 0 when it was not asked for.
    """

    tokens: Int[Tensor, " n"]
    codes: Float[Tensor, "n dim"]
    entropy_loss: Float[Tensor, ""]


class Codebook(nn.Module):
    """The code vectors, searched and read inside one forward so that ZeRO-3 gathers them once.

    Args:
        num_codes: K.
        dim: D.
        is_learned: A parameter, moved by gradients; otherwise a float32 buffer.
        is_normalized: Codes are used at unit length (the stored rows need not have it).
    """

    weight: Tensor

    def __init__(self, num_codes: int, dim: int, *, is_learned: bool, is_normalized: bool) -> None:
        super().__init__()
        self.is_normalized = is_normalized
        weight = torch.empty(num_codes, dim).uniform_(-1.0 / num_codes, 1.0 / num_codes)
        if is_normalized:
            weight = functional.normalize(weight, dim=1)
        if is_learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(
        self,
        z_ND: Optional[Float[Tensor, "n dim"]] = None,
        tokens: Optional[Int[Tensor, " n"]] = None,
        entropy_temperature: Optional[float] = None,
    ) -> Found:
        """Tokens of the latents (or the given tokens), their codes, and the entropy loss."""
        entropy = torch.zeros((), device=self.weight.device)
        if tokens is None:
            assert z_ND is not None
            with torch.no_grad():
                tokens = _nearest_rows(z_ND, self._at_its_length(self.weight.float()))
        if entropy_temperature is not None:
            assert z_ND is not None
            # A copy: the pieces are built again in the backward, when ZeRO-3 has let go of it.
            rows_KD = self._at_its_length(self.weight.to(torch.float32, copy=True))
            entropy = entropy_loss(z_ND, rows_KD, entropy_temperature)
        codes_ND = self._at_its_length(functional.embedding(tokens, self.weight).float())
        return Found(tokens, codes_ND, entropy)

    def _at_its_length(self, rows_ND: Tensor) -> Tensor:
        return functional.normalize(rows_ND, dim=1) if self.is_normalized else rows_ND

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return apply_keeping_float32_buffers(self, fn, recurse)


def world_size() -> int:
    """Ranks that train together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def apply_keeping_float32_buffers(
    module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool
) -> nn.Module:
    """`nn.Module._apply` that moves float32 buffers between devices but never rounds them.

    DeepSpeed before 0.19 calls `module.bfloat16()` on the whole model: moving averages with a decay
    of 0.99 then stand still, because bf16 has 8 bits.
    """
    before = dict(module._buffers)
    nn.Module._apply(module, fn, recurse)
    keep_float32(module, before)
    return module


def keep_float32(module: nn.Module, before: Mapping[str, Optional[Tensor]]) -> None:
    """Put back what rounded a module's own float32 buffers since `before`, on their new device."""
    for name, buffer in before.items():
        after = module._buffers[name]
        if buffer is None or after is None:
            continue
        if buffer.dtype == torch.float32 and after.dtype != torch.float32:
            module._buffers[name] = buffer.to(device=after.device)
