"""What decoding remembers: keys and values of every layer, in memory laid out once.

Shapes: B pictures, L grid tokens, T text tokens, N heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass
class LayerCache:
    """Self-attention's keys and values of one layer; rows beyond the position are not yet written.

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
class DecodingState:
    """One batch of pictures being written, token by token.

    Attributes:
        layers: Self-attention caches, one a layer.
        text_keys: Cross-attention keys, one [B, N, T, K] a layer, computed once.
        text_values: Their values.
        text_mask: True where a picture may look; None where all of its text tokens count.
        position: How many input positions (the start token is the first) have been read.
    """

    layers: list[LayerCache]
    text_keys: list[Tensor]
    text_values: list[Tensor]
    text_mask: Optional[Bool[Tensor, "batch 1 1 words"]]
    position: int = 0
