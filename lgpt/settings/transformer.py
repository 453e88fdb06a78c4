"""The transformer's shape."""

from __future__ import annotations

from typing import Literal, Optional

from pydantic import Field

from lgpt.settings.section import Section


class TransformerSettings(Section):
    """LatentGPT. Codebook size, token grid and text width come from the VQ-VAE and text encoder."""

    layers: int = Field(24, ge=1)
    hidden: int = Field(1024, ge=8)
    heads: int = Field(16, ge=1)
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_hidden: Optional[int] = Field(
        None, ge=1, description="default: 4 x hidden (SwiGLU has three such matrices)"
    )
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    positions: Literal["rope2d", "learned"] = "rope2d"
    qk_norm: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    pkeep: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of input tokens kept in training; the others become random codes "
        "(taming-transformers' name)",
    )
    zero_head: bool = Field(
        False,
        description="the head starts at zero and the loss at exactly ln(codes); false: at N(0, "
        "1 / (16 x hidden)), from where the loss falls faster",
    )
    cond_drop: float = Field(
        0.1, ge=0, le=1, description="share of captions replaced by the learned null embedding"
    )
    attention: Literal["auto", "flash", "sdpa"] = "auto"
