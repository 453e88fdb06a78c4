"""Model folders: `config.json` with its `model_type`, and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Union

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lgpt.core.errors import CheckpointError
from lgpt.core.files import refuse_lfs_pointer, write_json_atomically

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def write_model_folder(
    folder: Union[str, Path], model: nn.Module, model_type: str, config: dict[str, Any]
) -> None:
    """Write a model's whole state and its config; the config comes last."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(state, target / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json_atomically(target / CONFIG_FILE, {"model_type": model_type, **config})


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
    require_files(folder, (CONFIG_FILE, WEIGHTS_FILE), folder_kind, f". {maker}")
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

    Raises:
        CheckpointError: The file is damaged.
    """
    path = Path(folder) / WEIGHTS_FILE
    try:
        refuse_lfs_pointer(path)
        return load_file(path), str(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}. Copy it again, or write the model folder again."
        ) from error


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
