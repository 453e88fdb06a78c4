"""One block of LatentGPT: self-attention, cross-attention to the text, feed-forward.

Shapes: B batch, L image tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Optional

from torch import Tensor, nn
from torch.nn import functional

from lgpt.models.attention import CrossAttention, ResidualLinear, SelfAttention, build_norm
from lgpt.models.dropout import Dropout
from lgpt.models.kv_cache import BlockCache
from lgpt.models.swiglu import swiglu

if TYPE_CHECKING:
    from lgpt.models.latent_gpt import LatentGPTConfig


class FeedForward(nn.Module):
    """SwiGLU or GELU."""

    def __init__(self, config: LatentGPTConfig) -> None:
        super().__init__()
        inner = config.mlp_hidden or 4 * config.hidden
        self.is_gated = config.mlp == "swiglu"
        self.up = nn.Linear(config.hidden, 2 * inner if self.is_gated else inner, bias=False)
        self.down = ResidualLinear(inner, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_gated:
            return self.down(functional.gelu(self.up(x)))
        return self.down(swiglu(self.up(x)))


class Block(nn.Module):
    """Pre-norm: causal self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, config: LatentGPTConfig) -> None:
        super().__init__()
        c = config
        self.self_norm = build_norm(c.norm, c.hidden)
        self.self_attention = SelfAttention(c.hidden, c.heads, c.norm, c.qk_norm)
        self.cross_norm = build_norm(c.norm, c.hidden)
        text_width = c.text_width or c.hidden
        self.cross_attention = CrossAttention(c.hidden, text_width, c.heads, c.norm, c.qk_norm)
        self.mlp_norm = build_norm(c.norm, c.hidden)
        self.mlp = FeedForward(c)
        self.dropout = Dropout(c.dropout)
        # (x, rotation, text, text_mask, cache, position) -> x: cpu_block.py has a faster way.
        self.cached_step: Optional[Callable[..., Tensor]] = None

    def forward(
        self,
        x_BLD: Tensor,
        rotation: Optional[tuple[Tensor, Tensor]],
        text: Tensor,
        text_mask: Optional[Tensor],
        kernel: str,
        cache: Optional[BlockCache] = None,
        position: int = 0,
    ) -> Tensor:
        """All positions at once; with `cache` those from `position` on, which it then holds.

        The one way in, so that ZeRO-3 can gather a block as a whole. The text's keys and values are
        computed at position 0 and kept in the cache.
        """
        if cache is None:
            return self.all_positions(x_BLD, rotation, text, text_mask, kernel)
        if self.cached_step is not None:
            return self.cached_step(x_BLD, rotation, text, text_mask, cache, position)
        attended = self.self_attention(
            self.self_norm(x_BLD), rotation, kernel, cache.image, position
        )
        x_BLD = x_BLD + self.dropout(attended)
        if cache.text is None:
            keys, values = self.cross_attention.keys_values(text)
            kept = cache.image.keys.dtype
            cache.text = (keys.to(kept), values.to(kept))
        return self._after_self_attention(x_BLD, *cache.text, text_mask)

    def all_positions(
        self,
        x_BLD: Tensor,
        rotation: Optional[tuple[Tensor, Tensor]],
        text: Tensor,
        text_mask: Optional[Tensor],
        kernel: str,
    ) -> Tensor:
        """Without a cache; through `forward` only, or ZeRO-3 has not gathered the block."""
        x_BLD = x_BLD + self.dropout(self.self_attention(self.self_norm(x_BLD), rotation, kernel))
        keys, values = self.cross_attention.keys_values(text)
        return self._after_self_attention(x_BLD, keys, values, text_mask)

    def _after_self_attention(
        self, x_BLD: Tensor, keys: Tensor, values: Tensor, text_mask: Optional[Tensor]
    ) -> Tensor:
        attended = self.cross_attention(self.cross_norm(x_BLD), keys, values, text_mask)
        x_BLD = x_BLD + self.dropout(attended)
        return x_BLD + self.dropout(self.mlp(self.mlp_norm(x_BLD)))
