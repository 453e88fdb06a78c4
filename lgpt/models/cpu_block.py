"""LatentGPT's blocks for drawing on a CPU: a block's whole step in one call of `cpu_decoding.cpp`.

The matrices lie in the library's order, in bf16 or float32 as the model was, or in 8 bits; the kept
keys and values are float32 beside float32 matrices, else bf16; everything else is float32. Without
a cache the model still computes in PyTorch, on the same matrices.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lgpt.models import cpu_library as native
from lgpt.models.attention import Rotation
from lgpt.models.block import Block
from lgpt.models.int8_weights import to_int8
from lgpt.models.kv_cache import BlockCache
from lgpt.models.latent_gpt import LatentGPT
from lgpt.models.packed_linear import pack_linear_layers
from lgpt.models.token_head import TokenHead


def pack_for_decoding(model: LatentGPT, *, int8: bool = False) -> bool:
    """Lay a model on a CPU out for drawing, in place; afterwards it can only draw and be saved.

    With a C++ compiler through `cpu_decoding.cpp`, whose bf16 needs no bf16 units; else through
    oneDNN's packed products (`pack_linear_layers`).

    Args:
        model: LatentGPT in float32 or bf16, on the CPU.
        int8: Round the matrices to 8 bits (`to_int8`), for which the library is needed. What the
            model then saves are the rounded matrices, in the dtype that they had.

    Returns:
        False, and nothing done, where neither can be had.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, TokenHead))]
    dtype = layers[0].weight.dtype
    library = native.cpu_library() if all(_fits(layer, int8) for layer in layers) else None
    if library is None:
        return not int8 and pack_linear_layers(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Linear, TokenHead)):
                setattr(module, name, CpuLinear(child, library, int8=int8))
    model.float()  # norms and embeddings; the matrices are no parameters any more
    kept = torch.bfloat16 if int8 else dtype
    model.empty_cache = functools.partial(TiledCache.empty, kept)
    for module in model.modules():
        if isinstance(module, Block):
            module.cached_step = _CachedStep(module, library, kept)

    def in_old_dtype(_: nn.Module, state: dict[str, Any], *rest: Any) -> None:
        state.update({name: tensor.to(dtype) for name, tensor in state.items()})

    model.register_state_dict_post_hook(in_old_dtype)
    return True


def _fits(layer: Union[nn.Linear, TokenHead], int8: bool) -> bool:
    assert getattr(layer, "bias", None) is None, "no layer of LatentGPT has a bias"
    weight = layer.weight
    if int8 or weight.dtype == torch.bfloat16:
        return weight.shape[1] % 2 == 0
    return weight.dtype == torch.float32


class CpuLinear(nn.Module):
    """`x W^T` by the library: float32 in and out, W as it was or in 8 bits."""

    def __init__(
        self, layer: Union[nn.Linear, TokenHead], library: ctypes.CDLL, *, int8: bool = False
    ) -> None:
        super().__init__()
        self._library = library
        self.outputs, self.inputs = layer.weight.shape
        weight, self.scales = to_int8(layer.weight) if int8 else (layer.weight, None)
        self.tiles: Tensor = native.in_tiles(weight)

    def forward(self, x: Tensor, targets: None = None) -> Tensor:
        """[.., inputs] to [.., outputs]. There is no loss: `targets` stands where the head's do."""
        assert targets is None, "a packed model computes no loss"
        rows = x.reshape(-1, self.inputs).contiguous()
        y = native.times_tiles(self._library, self.tiles, self.outputs, rows, self.scales)
        return y.view(*x.shape[:-1], self.outputs)

    @property
    def matrix(self) -> native.Matrix:
        """As the library wants it."""
        return native.matrix(self.tiles, self.outputs, self.inputs, self.scales)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The plain matrix under its old name, so that a packed model is saved whole."""
        weight = native.out_of_tiles(self.tiles, self.outputs)
        destination[prefix + "weight"] = (
            weight if self.scales is None else weight * self.scales[:, None]
        )


@dataclass
class TiledCache:
    """Keys and values as the library reads and writes them, in bf16 or float32.

    Both are matrices whose positions and K are filled up to whole tiles: of each picture and head
    keys [P, K] lie as `in_tiles` has them, and values as [P/2, K, 2], or in float32 [P, K].
    """

    keys: Float[Tensor, "batch heads numbers"]
    values: Float[Tensor, "batch heads numbers"]
    positions: int

    @classmethod
    def empty(cls, dtype: torch.dtype, shape: tuple[int, int, int, int], *_: Any) -> TiledCache:
        """With room for [B, L, N, K], all 0: what fills a tile up is multiplied too.

        What `ImageCache.empty` is told besides does not matter here.
        """
        batch, positions, heads, head_width = shape
        numbers = _filled_up(positions) * _filled_up(head_width)
        return cls(*(torch.zeros(batch, heads, numbers, dtype=dtype) for _ in range(2)), positions)

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, dtype: torch.dtype) -> TiledCache:
        """Of these keys and values, each [B, N, P, K]."""
        positions, head_width = keys.shape[2:]
        filling = (0, -head_width % native.TILE, 0, -positions % native.TILE)
        keys, values = (nn.functional.pad(tensor.to(dtype), filling) for tensor in (keys, values))
        if dtype == torch.bfloat16:
            values = values.unflatten(2, (-1, 2)).transpose(-2, -1)
        return cls(native.in_tiles(keys).flatten(2), values.flatten(2).contiguous(), positions)


def _filled_up(count: int) -> int:
    return count + -count % native.TILE


class _CachedStep:
    """A block's positions from `position` on, beside what its cache holds."""

    def __init__(self, block: Block, library: ctypes.CDLL, kept_dtype: torch.dtype) -> None:
        attention, cross, mlp = block.self_attention, block.cross_attention, block.mlp
        self._library, self._keys_values = library, cross.keys_values
        self._kept_dtype = kept_dtype
        matrices = (attention.qkv, attention.out, cross.q, cross.out, mlp.up, mlp.down)
        norms = (block.self_norm, attention.q_norm, attention.k_norm)
        norms += (block.cross_norm, cross.q_norm, block.mlp_norm)
        # Their addresses are kept, so the tensors must be, whatever is put in their place later.
        self._tensors = [matrix.tiles for matrix in matrices]
        self._weights = sum(tiles.numel() for tiles in self._tensors)
        self._tensors += [m.scales for m in matrices if m.scales is not None]
        self._tensors += [p.data for norm in norms for p in norm.parameters()]
        self._block = native.Block(
            *(matrix.matrix for matrix in matrices),
            *(_norm(norm) for norm in norms),
            attention.qkv.inputs,
            attention.heads,
            mlp.down.inputs,
            mlp.is_gated,
            native.FORMATS[attention.qkv.tiles.dtype],
        )

    def __call__(
        self,
        x_BLD: Tensor,
        rotation: Optional[Rotation],
        text: Tensor,
        text_mask: Optional[Tensor],
        cache: BlockCache,
        position: int,
    ) -> Tensor:
        kept = cache.image
        if cache.text is None:
            cache.text = TiledCache.of(*self._keys_values(text), kept.keys.dtype)
        batch, length, _ = x_BLD.shape
        assert kept.keys.dtype == self._kept_dtype, kept.keys.dtype
        assert position + length <= kept.positions, (position, length, kept.positions)
        x_BLD = x_BLD.clone(memory_format=torch.contiguous_format)  # written over
        threads = native.threads_for(batch * length * self._weights)
        sizes = (batch, length, kept.positions, cache.text.positions, threads)
        scratch = x_BLD.new_empty(self._library.lgpt_scratch_floats(self._block, *sizes))
        cos, sin = (None, None) if rotation is None else rotation
        tensors = (cos, sin, cache.text.keys, cache.text.values, text_mask)
        call = native.Call(
            x_BLD.data_ptr(),
            *(batch, length, position),
            *(kept.keys.data_ptr(), kept.values.data_ptr(), kept.positions),
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
            cache.text.positions,
            scratch.data_ptr(),
            threads,
        )
        self._library.lgpt_block(self._block, call)
        return x_BLD


def _norm(norm: nn.Module) -> native.Norm:
    """Its addresses."""
    if isinstance(norm, nn.Identity):
        return native.Norm(None, None, 0.0)
    assert isinstance(norm, (nn.RMSNorm, nn.LayerNorm)), norm
    bias = getattr(norm, "bias", None)
    return native.Norm(
        norm.weight.data_ptr(), None if bias is None else bias.data_ptr(), float(norm.eps or 0.0)
    )
