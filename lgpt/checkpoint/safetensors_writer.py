"""Safetensors written piece by piece, in files of a limited size, with an index.

A file is laid out before anything is read: 8 bytes with the header's length (little-endian), the
header in JSON, then the tensors without gaps. So each piece goes to its place as it comes, and no
tensor has to be whole in memory. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from lgpt.checkpoint.weight_source import Counted, TensorInfo, WeightSource
from lgpt.core.errors import SettingsError
from lgpt.core.files import write_json_atomically
from lgpt.models.model_folder import INDEX_FILE, WEIGHTS_FILE

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ELEMENTS_AT_A_TIME = 1 << 22
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes."""

    descriptor: int
    offset: int
    dtype: torch.dtype


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MiB` or a plain number.

    Raises:
        SettingsError: It is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = match.group(2).upper() if match else ""
    if match is None or (unit and unit not in _UNITS):
        raise SettingsError(f"size '{text}' is no number of bytes; write it as 5GB, 500MB or 2GiB.")
    size = int(float(match.group(1)) * _UNITS.get(unit, 1))
    if size < 1:
        raise SettingsError(f"size '{text}' must be at least one byte.")
    return size


def write_safetensors(
    source: WeightSource, folder: Path, *, dtype: Optional[torch.dtype], max_shard_bytes: int
) -> None:
    """Write all tensors of a source as safetensors files, and `model.safetensors.index.json`.

    Tied weights are stored once; the header's metadata maps each further name to the stored one, as
    `safetensors.torch.save_model` does. In memory are at most one piece and a few MiB.

    Args:
        source: What to write.
        folder: Is there; its files of these names are replaced.
        dtype: Of floating-point tensors; None keeps the source's.
        max_shard_bytes: Most bytes of tensors in a file; a larger tensor gets a file of its own.

    Raises:
        CheckpointError: The source gave too little or too much of a tensor.
        OSError: The files cannot be written.
    """
    infos = {
        name: TensorInfo(
            info.shape, dtype if dtype and info.dtype.is_floating_point else info.dtype
        )
        for name, info in source.tensors.items()
    }
    shards = _shards(infos, max_shard_bytes)
    files = _file_names(len(shards))
    descriptors: list[int] = []
    places: dict[str, _Place] = {}
    try:
        for file, names in zip(files, shards):
            descriptors.append(os.open(folder / file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644))
            shard = {name: infos[name] for name in names}
            aliases = {a: o for a, o in source.aliases.items() if o in shard}
            places.update(_lay_out(descriptors[-1], shard, aliases))
        counted = Counted(source)
        for piece in source.pieces():
            _write(places[piece.name], piece.start, piece.values)
            counted.take(piece)
        counted.finish()
        for descriptor in descriptors:
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    _write_index(folder, infos, dict(zip(files, shards)))


def bytes_of(source: WeightSource, dtype: Optional[torch.dtype]) -> int:
    """What the tensors of a source will take on the disk."""
    return sum(
        info.elements * (dtype if dtype and info.dtype.is_floating_point else info.dtype).itemsize
        for info in source.tensors.values()
    )


def _shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Names a file, in order, filled up to the limit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        needed = _bytes(info)
        if shards[-1] and size + needed > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_FILE]
    stem, ending = WEIGHTS_FILE.rsplit(".", 1)
    return [f"{stem}-{number:05d}-of-{count:05d}.{ending}" for number in range(1, count + 1)]


def _lay_out(
    descriptor: int, shard: Mapping[str, TensorInfo], aliases: Mapping[str, str]
) -> dict[str, _Place]:
    """Write the header, give the file its size, and say where each tensor goes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **aliases}}
    offset, offsets = 0, {}
    # Wide numbers first: then all of them stand on multiples of their width.
    for name, info in sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize):
        end = offset + _bytes(info)
        header[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offsets[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write_all(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
    begin = 8 + len(text)
    os.ftruncate(descriptor, begin + offset)
    return {n: _Place(descriptor, begin + offsets[n], shard[n].dtype) for n in shard}


def _write(place: _Place, start: int, values: Tensor) -> None:
    for first in range(0, values.numel(), _ELEMENTS_AT_A_TIME):
        part = values[first : first + _ELEMENTS_AT_A_TIME].to(place.dtype).contiguous()
        at = place.offset + (start + first) * place.dtype.itemsize
        _write_all(place.descriptor, memoryview(part.view(torch.uint8).numpy()), at)


def _write_all(descriptor: int, payload: memoryview, offset: int) -> None:
    while payload:
        written = os.pwrite(descriptor, payload, offset)
        payload, offset = payload[written:], offset + written


def _write_index(
    folder: Path, infos: Mapping[str, TensorInfo], files: Mapping[str, list[str]]
) -> None:
    weight_map = {name: file for file, names in files.items() for name in names}
    metadata = {
        "total_size": sum(_bytes(info) for info in infos.values()),
        "total_parameters": sum(info.elements for info in infos.values()),
    }
    write_json_atomically(folder / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


def _bytes(info: TensorInfo) -> int:
    return info.elements * info.dtype.itemsize
