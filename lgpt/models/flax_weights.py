"""Weights of vqgan-jax, read with msgpack and numpy alone, under taming's key names.

`flax_model.msgpack` is a map of maps; a leaf is ExtType 1 that holds (shape, dtype name, C-order
bytes). `down_0/block_1` is `down.0.block.1` in taming; kernels are HWIO instead of OIHW.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.models.model_folder import require_files

_ARRAY = 1
_CHUNKED = "__msgpack_chunked_array__"
# Fused by Flax as name_N; `mid.block_1` and `mid.attn_1` have their underscore in taming too.
_NUMBERED = re.compile(r"\b(down|up|block|attn)_(\d+)")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def read_flax_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and the tensors under taming's keys, in float32.

    Raises:
        CheckpointError: A file is missing, damaged, or not a vqgan-jax VQModel.
    """
    config_path, weights_path = folder / "config.json", folder / "flax_model.msgpack"
    require_files(
        folder,
        (config_path.name, weights_path.name),
        "a Flax VQGAN",
        "; it needs config.json and flax_model.msgpack.",
    )
    try:
        values = json.loads(config_path.read_text())
        payload = weights_path.read_bytes()
        tree = msgpack.unpackb(
            payload, ext_hook=_array_of, raw=False, strict_map_key=False, max_bin_len=len(payload)
        )
        leaves = dict(_flatten(tree, ()))
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise CheckpointError(
            f"{folder} is damaged or not a Flax VQGAN: {error}. Copy or download it again."
        ) from error
    return values, {_taming_key(path): _taming_tensor(path, leaf) for path, leaf in leaves.items()}


def _array_of(code: int, payload: bytes) -> np.ndarray:
    if code != _ARRAY:
        raise ValueError(f"msgpack extension {code} is not an array")
    shape, dtype_name, buffer = msgpack.unpackb(payload, raw=False, max_bin_len=len(payload))
    if dtype_name == "bfloat16":  # the upper half of a float32
        widened = np.frombuffer(buffer, dtype="<u2").astype("<u4") << 16
        return widened.view("<f4").reshape(shape)
    if not re.fullmatch(r"float(16|32|64)", dtype_name):
        raise ValueError(f"arrays of {dtype_name} are no weights")
    return np.frombuffer(buffer, dtype=np.dtype(dtype_name)).reshape(shape)


def _flatten(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    if isinstance(node, np.ndarray):
        yield path, node
    elif isinstance(node, dict) and _CHUNKED in node:  # how Flax writes arrays of over 2^30 bytes
        chunks = [node["chunks"][str(index)] for index in range(len(node["chunks"]))]
        shape = [node["shape"][str(index)] for index in range(len(node["shape"]))]
        yield path, np.concatenate(chunks).reshape(shape)
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _flatten(child, (*path, str(name)))
    else:
        raise ValueError(f"{'/'.join(path)} is a {type(node).__name__}, not an array")


def _taming_key(path: tuple[str, ...]) -> str:
    *modules, leaf = path
    if leaf not in _LEAVES:
        raise CheckpointError(f"the Flax tree has an unknown leaf {'/'.join(path)}.")
    fused = [name if "mid" in modules else _NUMBERED.sub(r"\1.\2", name) for name in modules]
    return ".".join([*fused, _LEAVES[leaf]])


def _taming_tensor(path: tuple[str, ...], leaf: np.ndarray) -> Tensor:
    array = leaf.astype(np.float32)
    if path[-1] == "kernel":
        array = array.transpose(3, 2, 0, 1)
    elif any(name.startswith("norm") for name in path):
        array = array.reshape(-1)  # Flax before 0.3.6 stored GroupNorm as (1, 1, 1, C)
    return torch.from_numpy(np.ascontiguousarray(array))
