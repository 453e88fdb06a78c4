"""Attention kernels, rotary positions and the two attention layers of a LatentGPT block.

Shapes: B batch, L image tokens (queries), S keys, T text tokens, D width, N heads, K head width.
Heads stand before or after the length: `q_BLNK` is how layers and flash-attn hold them.
"""

from __future__ import annotations

import functools
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from lgpt.core.errors import SettingsError
from lgpt.core.logging import get_logger
from lgpt.models.kv_cache import ImageCache
from lgpt.models.rms_norm import RMSNorm

_logger = get_logger(__name__)

# cos and sin of every input position, each [L, K/2].
Rotation = tuple[Tensor, Tensor]


class ResidualLinear(nn.Linear):
    """A projection whose output is added to the residual stream; it starts smaller."""


def build_norm(kind: str, width: int) -> nn.Module:
    """RMSNorm or LayerNorm over the last axis."""
    assert kind in ("rmsnorm", "layernorm"), kind
    return RMSNorm(width, eps=1e-6) if kind == "rmsnorm" else nn.LayerNorm(width)


@functools.cache
def flash_attention_problem() -> Optional[str]:
    """Why flash-attn cannot be used here, or None. Imports it: only that shows a missing kernel."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the GPU's compute capability is {capability}, flash-attn needs (8, 0)"
    try:
        from flash_attn import flash_attn_func, flash_attn_with_kvcache  # noqa: F401
    except ImportError as error:
        return f"the flash-attn package cannot be imported ({error})"
    return None


@functools.cache
def choose_kernel(requested: str, device_type: str, dtype: torch.dtype, head_width: int) -> str:
    """`flash` or `sdpa` for self-attention; `auto` logs once what it took and why.

    Raises:
        SettingsError: `flash` was asked for by name and cannot be used.
    """
    assert requested in ("auto", "flash", "sdpa"), requested
    if requested == "sdpa":
        return "sdpa"
    problem = None
    if device_type != "cuda":
        problem = f"the model is on {device_type}"
    elif dtype not in (torch.float16, torch.bfloat16):
        problem = f"flash-attn needs float16 or bfloat16, the activations are {dtype}"
    elif head_width % 8 or head_width > 256:
        problem = f"flash-attn needs a head width of 8, 16, .. 256, the model has {head_width}"
    problem = problem or flash_attention_problem()
    if problem is None:
        _logger.info("attention: flash-attn")
        return "flash"
    if requested == "flash":
        raise SettingsError(
            f"transformer.attention is 'flash', but {problem}. Install it with `pip install "
            "--no-build-isolation flash-attn` on a GPU machine, or set transformer.attention=auto."
        )
    _logger.info("attention: PyTorch's SDPA, because %s", problem)
    return "sdpa"


def causal_attention(
    q_BLNK: Float[Tensor, "batch length heads head_width"],
    k_BLNK: Float[Tensor, "batch length heads head_width"],
    v_BLNK: Float[Tensor, "batch length heads head_width"],
    kernel: str,
) -> Float[Tensor, "batch length heads head_width"]:
    """softmax(q k^T / sqrt(K)) v over each position and those before it."""
    if kernel == "flash":
        from flash_attn import flash_attn_func

        # By keyword: flash-attn 2.6 put `softcap` in the middle of the positional ones.
        return flash_attn_func(q=q_BLNK, k=k_BLNK, v=v_BLNK, causal=True)
    attended = _scaled_dot_product_attention(
        q_BLNK.transpose(1, 2), k_BLNK.transpose(1, 2), v_BLNK.transpose(1, 2), is_causal=True
    )
    return attended.transpose(1, 2)


def cached_attention(
    q_B1NK: Float[Tensor, "batch 1 heads head_width"],
    k_B1NK: Float[Tensor, "batch 1 heads head_width"],
    v_B1NK: Float[Tensor, "batch 1 heads head_width"],
    cache: ImageCache,
    position: int,
    kernel: str,
) -> Float[Tensor, "batch 1 heads head_width"]:
    """Write one position into the cache and attend to all positions up to it."""
    if kernel == "flash":
        from flash_attn import flash_attn_with_kvcache

        lengths = torch.full((len(q_B1NK),), position, dtype=torch.int32, device=q_B1NK.device)
        return flash_attn_with_kvcache(
            q=q_B1NK,
            k_cache=cache.keys,
            v_cache=cache.values,
            k=k_B1NK,
            v=v_B1NK,
            cache_seqlens=lengths,
            causal=True,
        )
    keys, values = cache.append(k_B1NK, v_B1NK, position)
    attended = _scaled_dot_product_attention(
        q_B1NK.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    )
    return attended.transpose(1, 2)


def _scaled_dot_product_attention(
    q_BNLK: Tensor,
    k_BNSK: Tensor,
    v_BNSK: Tensor,
    *,
    attn_mask: Optional[Tensor] = None,
    is_causal: bool = False,
) -> Tensor:
    """PyTorch's; on a CPU bf16 is computed in float32 and rounded once.

    There its bf16 kernel takes up to six times as long, most of it in the backward pass (torch
    2.13, AVX-512 with bf16 units).
    """
    dtype = product_dtype(q_BNLK)
    attended = functional.scaled_dot_product_attention(
        q_BNLK.to(dtype),
        k_BNSK.to(dtype),
        v_BNSK.to(dtype),
        attn_mask=attn_mask,
        is_causal=is_causal,
    )
    return attended.to(q_BNLK.dtype)


def product_dtype(activations: Tensor) -> torch.dtype:
    """In which attention's products are computed; decoding keeps keys and values so."""
    if activations.device.type == "cpu" and activations.dtype == torch.bfloat16:
        return torch.float32
    return activations.dtype


class Rope2d(nn.Module):
    """Rotary positions over (row, column) of the token grid, for the start token and the tokens.

    Half of the rotated pairs turn with the row, half with the column (1-based, so that no token
    shares the start token's place). The start token has the identity rotation: zeros instead, as in
    LlamaGen, make its query and key vanish (ControlAR issue 18). Source: Su et al. 2021,
    https://arxiv.org/abs/2104.09864.

    Args:
        grid_height: Rows of the token grid.
        grid_width: Columns.
        head_width: K, a multiple of 4.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid_height: int, grid_width: int, head_width: int) -> None:
        super().__init__()
        # numpy, because DeepSpeed's zero.Init makes every torch factory function round to bf16.
        quarter = head_width // 4
        frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
        rows, columns = np.divmod(np.arange(grid_height * grid_width), grid_width)
        angles = np.concatenate(
            [(rows[:, None] + 1) * frequencies, (columns[:, None] + 1) * frequencies], axis=1
        )
        angles = np.concatenate([np.zeros((1, 2 * quarter)), angles])
        self.register_buffer("cos", _float32(np.cos(angles)), persistent=False)
        self.register_buffer("sin", _float32(np.sin(angles)), persistent=False)

    def forward(self, start: int, length: int, dtype: torch.dtype) -> Rotation:
        """Tables of input positions start .. start + length - 1 in the activations' dtype."""
        stop = start + length
        return self.cos[start:stop].to(dtype), self.sin[start:stop].to(dtype)


def rotate(
    x_BLNK: Float[Tensor, "batch length heads head_width"], rotation: Rotation
) -> Float[Tensor, "batch length heads head_width"]:
    """Turn the pairs (x_j, x_{j+K/2}) by their angles."""
    cos, sin = rotation[0][:, None], rotation[1][:, None]
    first, second = x_BLNK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SelfAttention(nn.Module):
    """Causal attention over image tokens.

    Args:
        width: D.
        heads: N.
        norm: Kind of the query and key norms.
        qk_norm: Normalize queries and keys per head, before the rotation.
    """

    def __init__(self, width: int, heads: int, norm: str, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = build_norm(norm, width // heads) if qk_norm else nn.Identity()
        self.k_norm = build_norm(norm, width // heads) if qk_norm else nn.Identity()
        self.out = ResidualLinear(width, width, bias=False)

    def forward(
        self,
        x_BLD: Float[Tensor, "batch length width"],
        rotation: Optional[Any],
        kernel: str,
        cache: Optional[ImageCache] = None,
        position: int = 0,
    ) -> Float[Tensor, "batch length width"]:
        """All positions at once; with `cache` those from `position` on: one, or several from 0."""
        batch, length, _ = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.heads, -1)
        q_BLNK, k_BLNK, v_BLNK = qkv.unbind(dim=2)
        q_BLNK, k_BLNK = self.q_norm(q_BLNK), self.k_norm(k_BLNK)
        if rotation is not None:
            q_BLNK, k_BLNK = rotate(q_BLNK, rotation), rotate(k_BLNK, rotation)
        if cache is None or length > 1:
            if cache is not None:
                assert position == 0, position
                cache.append(k_BLNK, v_BLNK, position)
            attended = causal_attention(q_BLNK, k_BLNK, v_BLNK, kernel)
        else:
            attended = cached_attention(q_BLNK, k_BLNK, v_BLNK, cache, position, kernel)
        return self.out(attended.reshape(batch, length, -1))


class CrossAttention(nn.Module):
    """Attention from image tokens to text tokens.

    Args:
        width: D of the image tokens.
        text_width: Width of the text tokens.
        heads: N.
        norm: Kind of the query and key norms.
        qk_norm: Normalize queries and keys per head.
    """

    def __init__(self, width: int, text_width: int, heads: int, norm: str, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(text_width, 2 * width, bias=False)
        self.q_norm = build_norm(norm, width // heads) if qk_norm else nn.Identity()
        self.k_norm = build_norm(norm, width // heads) if qk_norm else nn.Identity()
        self.out = ResidualLinear(width, width, bias=False)

    def keys_values(
        self, text: Float[Tensor, "batch words text_width"]
    ) -> tuple[
        Float[Tensor, "batch heads words head_width"], Float[Tensor, "batch heads words head_width"]
    ]:
        """Keys and values of the text; in decoding they are computed once."""
        batch, words, _ = text.shape
        keys, values = self.kv(text).view(batch, words, 2, self.heads, -1).unbind(dim=2)
        return self.k_norm(keys).transpose(1, 2), values.transpose(1, 2)

    def forward(
        self,
        x_BLD: Float[Tensor, "batch length width"],
        keys: Float[Tensor, "batch heads words head_width"],
        values: Float[Tensor, "batch heads words head_width"],
        mask_B11T: Optional[Shaped[Tensor, "batch 1 1 words"]],
    ) -> Float[Tensor, "batch length width"]:
        """Attend to the text tokens whose mask is True, or where it is 0 and not -inf."""
        batch, length, _ = x_BLD.shape
        q_BLNK = self.q_norm(self.q(x_BLD).view(batch, length, self.heads, -1))
        attended = _scaled_dot_product_attention(
            q_BLNK.transpose(1, 2), keys, values, attn_mask=mask_B11T
        )
        return self.out(attended.transpose(1, 2).reshape(batch, length, -1))


def _float32(table: Any) -> Tensor:
    return torch.from_numpy(table.astype(np.float32))
