"""Weights out of any CLIP folder, as data: the text tower alone, or a whole CLIP."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.core.files import refuse_lfs_pointer

PREFIX = "text_model."
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TEXT_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")
_FEW_FILES = ("config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json")
_FEW_FILES += ("tokenizer_config.json", "vocab.json", "added_tokens.json")
_FEW_FILES += ("preprocessor_config.json",)

# Of the keys in a file those that are wanted, each with the name that it has here.
Choice = Callable[[Iterable[str]], dict[str, str]]


def files_of_clip(files: Sequence[str]) -> list[str]:
    """What to fetch of a CLIP repository: configs, tokenizer, and its weights in one format."""
    wanted = [name for name in files if name in _FEW_FILES]
    for whole in _WEIGHTS:
        stem, _, ending = whole.rpartition(".")
        found = [n for n in files if n == whole or n == f"{whole}.index.json"]
        found += [n for n in files if n.startswith(f"{stem}-") and n.endswith(f".{ending}")]
        if found:
            return wanted + found
    return wanted


def read_text_tower(folder: Path) -> dict[str, Tensor]:
    """Tensors of the text tower, without the prefix that transformers 4 gives them.

    Takes `model.safetensors` or `pytorch_model.bin`, whole or in pieces, of a CLIPModel, a
    CLIPTextModel or a CLIPTextModelWithProjection written by transformers 4 or 5. Every other
    tensor is left on the disk, unread.

    Raises:
        CheckpointError: No weights, a damaged file, one that is more than data, or numbers in it
            that are not finite.
    """
    return _read(folder, _text_keys)


def read_whole_clip(folder: Path) -> dict[str, Tensor]:
    """Tensors of both towers and their projections, under the names in the file.

    Raises:
        CheckpointError: As `read_text_tower`.
    """
    return _read(folder, lambda keys: {k: k for k in keys if not k.endswith("position_ids")})


def _read(folder: Path, choice: Choice) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        reader = _read_safetensors if path.suffix == ".safetensors" else _read_bin
        try:
            refuse_lfs_pointer(path)
            state.update(reader(path, choice))
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read as data: {str(error).splitlines()[0]} Copy or download it "
                "again."
            ) from error
    bad = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(f"{folder} holds numbers that are not finite, first in {bad[0]}.")
    return state


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            pieces = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / Path(piece).name for piece in sorted(set(pieces))]
    raise CheckpointError(f"{folder} has no weights: {' or '.join(_WEIGHTS)} is missing.")


def _text_keys(keys: Iterable[str]) -> dict[str, str]:
    """The text tower's keys, each with the name that it has here."""
    names = list(keys)
    # Bare names are transformers 5's CLIPTextModel; beside prefixed ones they are another tower's.
    has_prefix = any(name.startswith(PREFIX) for name in names)
    wanted = PREFIX if has_prefix else _TEXT_PARTS
    found = {name: name.removeprefix(PREFIX) for name in names if name.startswith(wanted)}
    # Older releases store position_ids, which are 0 .. 76 for every CLIP.
    return {name: bare for name, bare in found.items() if not bare.endswith("position_ids")}


def _read_safetensors(path: Path, choice: Choice) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {bare: file.get_tensor(key) for key, bare in choice(file.keys()).items()}


def _read_bin(path: Path, choice: Choice) -> dict[str, Tensor]:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong.")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch's unpickler lets all kinds through
        raise CheckpointError(
            f"{path} is not a file of tensors alone, so it was not opened; give a CLIP with "
            "model.safetensors, or save its tensors alone: torch.save(state_dict, path)."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError("it holds no named tensors.")
    return {bare: content[key] for key, bare in choice(content).items()}
