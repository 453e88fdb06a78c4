"""Weights of vqgan-jax, read with msgpack and numpy alone, and how they lie under our names.

`flax_model.msgpack` is a map of maps; a leaf is ExtType 1 that holds (shape, dtype name, C-order
bytes). `down_0/block_1` is `down.0.block.1` in taming; kernels are HWIO instead of OIHW.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.core.files import refuse_lfs_pointer
from lgpt.models.strict_loading import Layout, Shape

_ARRAY = 1
_CHUNKED = "__msgpack_chunked_array__"
# Fused by Flax as name_N; `mid.block_1` and `mid.attn_1` have their underscore in taming too.
_NUMBERED = re.compile(r"\b(down|up|block|attn)\.(\d+)")
_DEEPEST = 16
_LONGEST_NAME = 256


class FlaxLayout(Layout):
    """vqgan-jax's tree as paths: `encoder/down_0/block_1/conv1/kernel`."""

    def name(self, key: str) -> str:
        """The path; one to one on all of taming's keys."""
        module, leaf = key.rsplit(".", 1)
        if leaf == "weight":
            own = module.rsplit(".", 1)[-1]
            leaf = "scale" if _is_norm(own) else "embedding" if own == "embedding" else "kernel"
        return "/".join([*_NUMBERED.sub(r"\1_\2", module).split("."), leaf])

    def shapes(self, key: str, shape: Shape) -> tuple[Shape, ...]:
        """Kernels are HWIO; Flax before 0.3.6 stored GroupNorm as (1, 1, 1, C)."""
        if len(shape) == 4:
            return (tuple(shape[axis] for axis in (2, 3, 1, 0)),)
        if _is_norm(key.split(".")[-2]):
            return (shape, (1, 1, 1, *shape))
        return (shape,)

    def axes(self, key: str, shape: Shape) -> tuple[int, ...]:
        """HWIO to OIHW."""
        return (3, 2, 0, 1) if len(shape) == 4 else tuple(range(len(shape)))


def _is_norm(module: str) -> bool:
    return module.startswith("norm")


def read_flax_tensors(path: Path) -> dict[str, Tensor]:
    """The arrays of a `flax_model.msgpack` under their paths, in float32, as they lie there.

    Raises:
        CheckpointError: The file is damaged, or holds more than maps of arrays.
    """
    try:
        refuse_lfs_pointer(path)
        payload = path.read_bytes()
        # No list stands outside of a leaf: one that claims to be long must not be laid out.
        tree = msgpack.unpackb(
            payload,
            ext_hook=_array_of,
            object_pairs_hook=_map_of,
            raw=False,
            strict_map_key=True,
            max_array_len=0,
            max_str_len=_LONGEST_NAME,
            max_bin_len=0,
        )
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            return {
                name: torch.from_numpy(array.astype(np.float32)) for name, array in _flatten(tree)
            }
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RecursionError,
        MemoryError,
        msgpack.UnpackException,
    ) as error:
        reason = str(error)[:200] or type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or not a Flax VQGAN: {reason}. Copy or download it again."
        ) from error


def _array_of(code: int, payload: bytes) -> np.ndarray:
    if code != _ARRAY:
        raise ValueError(f"msgpack extension {code} is not an array")
    shape, dtype_name, buffer = msgpack.unpackb(
        payload, raw=False, max_array_len=32, max_map_len=0, max_bin_len=len(payload)
    )
    sides = _sides(shape)
    if dtype_name == "bfloat16":  # the upper half of a float32
        widened = np.frombuffer(buffer, dtype="<u2").astype("<u4") << 16
        return widened.view("<f4").reshape(sides)
    if not isinstance(dtype_name, str) or not re.fullmatch(r"float(16|32|64)", dtype_name):
        raise ValueError(f"arrays of {str(dtype_name)[:40]} are no weights")
    return np.frombuffer(buffer, dtype=np.dtype(dtype_name).newbyteorder("<")).reshape(sides)


def _sides(shape: Any) -> tuple[int, ...]:
    # reshape would take -1 for "the rest".
    if not isinstance(shape, list) or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError("an array's shape is not a list of sizes")
    return tuple(shape)


def _map_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(
            f"a name stands twice among {', '.join(str(n)[:40] for n, _ in pairs[:8])}"
        )
    return values


def _flatten(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, np.ndarray]]:
    name = "/".join(path)
    if isinstance(node, np.ndarray):
        yield name, node
    elif isinstance(node, dict) and _CHUNKED in node:  # how Flax writes arrays of over 2^30 bytes
        chunks = [node["chunks"][str(index)].reshape(-1) for index in range(len(node["chunks"]))]
        sides = _sides([node["shape"][str(index)] for index in range(len(node["shape"]))])
        yield name, np.concatenate(chunks).reshape(sides)
    elif isinstance(node, dict) and len(path) < _DEEPEST:
        for child_name, child in node.items():
            if not isinstance(child_name, str) or "/" in child_name:
                raise ValueError(f"{child_name!r} under {name or 'the root'} is no name")
            yield from _flatten(child, (*path, child_name))
    else:
        raise ValueError(f"{name or 'the root'} is a {type(node).__name__}, not an array")
