"""What decoding remembers: keys and values of every block, in memory laid out once.

Shapes: B pictures, L grid tokens, T text tokens, N heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class ImageCache:
    """Self-attention's keys and values of one block; rows beyond the position are not yet written.

    Heads come after positions, as flash-attn has them; for SDPA a head's positions lie side by side
    in memory, as it reads them. On a CPU SDPA's is float32 for a model in bf16, because
    attention is computed so: converted once, not at every token.
    """

    keys: Float[Tensor, "batch length heads head_width"]
    values: Float[Tensor, "batch length heads head_width"]

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int], like: Tensor, dtype: torch.dtype, kernel: str
    ) -> ImageCache:
        """Zeros of shape [B, L, N, K], laid out for `kernel`, on `like`'s device."""
        batch, length, heads, head_width = shape
        if kernel == "flash":
            return cls(*(like.new_zeros(shape, dtype=dtype) for _ in range(2)))
        turned = (batch, heads, length, head_width)
        return cls(*(like.new_zeros(turned, dtype=dtype).transpose(1, 2) for _ in range(2)))

    def append(self, keys: Tensor, values: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Write positions [B, n, N, K] from `position` on; views of all up to the last of them."""
        stop = position + keys.shape[1]
        self.keys[:, position:stop] = keys
        self.values[:, position:stop] = values
        return self.keys[:, :stop], self.values[:, :stop]


@dataclass
class BlockCache:
    """What one block remembers.

    Attributes:
        image: Of self-attention: an ImageCache, or what a faster `Block.cached_step` wants.
        text: Of cross-attention, keys and values each [B, N, T, K], or the faster step's; None
            until the first position, then computed once for all.
    """

    image: Any
    text: Any = None


@dataclass
class DecodingState:
    """One batch of pictures being written, token by token.

    Attributes:
        blocks: One cache a block.
        text: Null embedding and text behind it, what cross-attention reads.
        text_mask: 0 where a picture may look, -inf elsewhere; None where all text tokens count.
        position: How many input positions (the start token is the first) have been read.
    """

    blocks: list[BlockCache]
    text: Float[Tensor, "batch words text_width"]
    text_mask: Optional[Float[Tensor, "batch 1 1 words"]]
    position: int = 0
