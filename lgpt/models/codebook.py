"""The code vectors, and the search for the nearest one.

Shapes: B batch, h w latent grid, D code width, K codes, N = B*h*w latent vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

# Distances are built for so many pairs at a time (2^25 float32 = 128 MiB).
_MAX_DISTANCES = 1 << 25


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
        rows = max(1, _MAX_DISTANCES // codebook_KD.shape[0])
        parts = [
            torch.addmm(squared_K, part, codebook_KD.t(), alpha=-2.0).argmin(dim=1)
            for part in z_ND.split(rows)
        ]
    return torch.cat(parts)


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
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, "n dim"]]:
        """Tokens of the latents (or the given tokens) and their codes in float32."""
        if tokens is None:
            assert z_ND is not None
            with torch.no_grad():
                rows = self.weight.float()
                tokens = _nearest_rows(
                    z_ND, functional.normalize(rows, dim=1) if self.is_normalized else rows
                )
        codes_ND = functional.embedding(tokens, self.weight).float()
        return tokens, functional.normalize(codes_ND, dim=1) if self.is_normalized else codes_ND

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
    before = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    nn.Module._apply(module, fn, recurse)
    for name, buffer in before.items():
        after = module._buffers[name]
        if buffer.dtype == torch.float32 and after is not None and after.dtype != torch.float32:
            module._buffers[name] = buffer.to(device=after.device)
    return module
