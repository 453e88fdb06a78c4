"""Model folders: `config.json` with its `model_type`, and safetensors, whole or in pieces."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Union

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lgpt.core.errors import CheckpointError
from lgpt.core.files import refuse_lfs_pointer, write_json_atomically

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def write_model_folder(
    folder: Union[str, Path], model: nn.Module, model_type: str, config: dict[str, Any]
) -> None:
    """Write a model's whole state and its config; the config comes last."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    (target / INDEX_FILE).unlink(missing_ok=True)  # of weights in pieces that were there before
    save_file(state, target / WEIGHTS_FILE, metadata={"format": "pt"})
    write_model_config(target, model_type, config)


def write_model_config(folder: Path, model_type: str, config: dict[str, Any]) -> None:
    """Write `config.json` alone."""
    write_json_atomically(folder / CONFIG_FILE, {"model_type": model_type, **config})


def read_model_config(
    folder: Union[str, Path], model_type: str, *, kind: str, folder_kind: str, maker: str
) -> dict[str, Any]:
    """The config of a folder that `write_model_folder` wrote, without its model_type.

    Args:
        kind: What it should describe, for messages.
        folder_kind: What the folder should be, for messages.
        maker: A sentence on where such a folder comes from, for messages.

    Raises:
        CheckpointError: A file is missing or damaged, or the config describes something else.
    """
    weights = INDEX_FILE if (Path(folder) / INDEX_FILE).is_file() else WEIGHTS_FILE
    require_files(folder, (CONFIG_FILE, weights), folder_kind, f". {maker}")
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != model_type:
        raise CheckpointError(f"{path} does not describe {kind} (model_type).")
    return values


def require_files(
    folder: Union[str, Path], names: Collection[str], kind: str, way_out: str
) -> None:
    """Raise when a folder lacks a file.

    Args:
        kind: What the folder then is not.
        way_out: How the message goes on behind "config.json is missing".
    """
    for name in names:
        if not (Path(folder) / name).is_file():
            raise CheckpointError(f"{folder} is not {kind}: {name} is missing{way_out}")


def read_weights(folder: Union[str, Path]) -> tuple[dict[str, Tensor], str]:
    """The tensors on the CPU, and the file's name for messages.

    Weights in pieces are found by their index. A name that the header's metadata maps to another
    one (tied weights, stored once) is the same tensor.

    Raises:
        CheckpointError: A file is missing or damaged, or not what the index says.
    """
    path = Path(folder) / WEIGHTS_FILE
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    files = _weight_files(Path(folder))
    for name in files:
        path = Path(folder) / name
        try:
            refuse_lfs_pointer(path)
            with safe_open(path, "pt") as stored:
                state.update({key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118
                aliases.update(stored.metadata() or {})
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error}. Copy it again, or write the model folder again."
            ) from error
    for alias, name in aliases.items():
        if name in state and alias not in state:
            state[alias] = state[name]
    return state, str(path if len(files) == 1 else Path(folder) / INDEX_FILE)


def _weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files; CheckpointError for an index that names files elsewhere."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return [WEIGHTS_FILE]
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in files):
            raise ValueError(f"it names files elsewhere: {files[0]}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of weights: {error}.") from error
    return files


def check_fields(
    config_class: type[Any], values: dict[str, Any], required: Collection[str], name: str
) -> None:
    """Refuse values that do not make a config dataclass.

    Raises:
        CheckpointError: Unknown fields, or required ones that are missing.
    """
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(set(values) - known):
        raise CheckpointError(
            f"{name} config has unknown fields {unknown}; known are {sorted(known)}."
        )
    if missing := sorted(set(required) - set(values)):
        raise CheckpointError(f"{name} config lacks {missing}.")
