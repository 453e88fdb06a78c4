"""What decoding remembers: keys and values of every block, in memory laid out once.

Shapes: B pictures, L grid tokens, T text tokens, N heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass
class ImageCache:
    """Self-attention's keys and values of one block; rows beyond the position are not yet written.

    The layout is flash-attn's, heads after positions.
    """

    keys: Float[Tensor, "batch length heads head_width"]
    values: Float[Tensor, "batch length heads head_width"]

    def append(self, keys: Tensor, values: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Write one position [B, 1, N, K]; views of all positions up to it."""
        self.keys[:, position : position + 1] = keys
        self.values[:, position : position + 1] = values
        return self.keys[:, : position + 1], self.values[:, : position + 1]


@dataclass
class BlockCache:
    """What one block remembers.

    Attributes:
        image: Of self-attention.
        text: Cross-attention's keys and values, each [B, N, T, K]; None until the first position.
    """

    image: ImageCache
    text: Optional[tuple[Tensor, Tensor]] = None


@dataclass
class DecodingState:
    """One batch of pictures being written, token by token.

    Attributes:
        blocks: One cache a block.
        text: Null embedding and text behind it, what cross-attention reads.
        text_mask: True where a picture may look; None where all of its text tokens count.
        position: How many input positions (the start token is the first) have been read.
    """

    blocks: list[BlockCache]
    text: Float[Tensor, "batch words text_width"]
    text_mask: Optional[Bool[Tensor, "batch 1 1 words"]]
    position: int = 0
