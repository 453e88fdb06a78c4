"""The transformer's shape."""

from __future__ import annotations

from typing import Literal, Optional

from pydantic import Field

from lgpt.settings.section import Section


class TransformerSettings(Section):
    """LatentGPT. Codebook size, token grid and text width come from the VQ-VAE and text encoder."""

    layers: int = Field(24, ge=1, description="blocks")
    hidden: int = Field(1024, ge=8, description="width; a multiple of heads")
    heads: int = Field(16, ge=1, description="of attention, each hidden / heads wide")
    mlp: Literal["swiglu", "gelu"] = Field("swiglu", description="the feed-forward layer")
    mlp_hidden: Optional[int] = Field(
        None, ge=1, description="default: 4 x hidden (SwiGLU has three such matrices)"
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="before each layer, and of queries and keys"
    )
    positions: Literal["rope2d", "learned"] = Field(
        "rope2d", description="rotations by row and column, or a learned vector a position"
    )
    qk_norm: bool = Field(True, description="queries and keys are normalised before they meet")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="of the embeddings and of what each layer adds"
    )
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
    attention: Literal["auto", "flash", "sdpa"] = Field(
        "auto", description="flash-attn where it is installed and fits, else PyTorch's SDPA"
    )
