"""Find and read a DeepSpeed JSON, by its name in `ds_configs` or by its path."""

from __future__ import annotations

import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lgpt.core.errors import SettingsError

_INSTALLED_FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
_CHECKOUT_FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"


def shipped_deepspeed_configs() -> list[str]:
    """Names in `ds_configs`, without `.json`."""
    return sorted(file.stem for file in _shipped_folder().glob("*.json"))


def load_deepspeed_json(name: str) -> dict[str, Any]:
    """Read a JSON by its name in `ds_configs` or by its path; refuse duplicate keys."""
    file = find_deepspeed_json(name)
    twice: list[str] = []
    try:
        pairs = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
        config = _plain(pairs, (), twice)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{file}:{error.lineno} is not JSON: {error.msg}.") from None
    except RecursionError:
        raise SettingsError(f"{file} is nested too deeply for a DeepSpeed config.") from None
    except (OSError, ValueError) as error:  # also bytes that are no UTF-8, and endless digits
        raise SettingsError(f"{file} cannot be read: {error}.") from None
    if twice:
        raise SettingsError([f"{file}: {key} is written twice; keep one." for key in twice])
    if not isinstance(config, dict):
        raise SettingsError(f"{file} must hold one JSON object.")
    return config


def find_deepspeed_json(name: str) -> Path:
    """The file meant by a path or by a name in `ds_configs`.

    Raises:
        SettingsError: There is none.
    """
    if is_own_deepspeed_json(name):
        return Path(name)
    file = _shipped_folder() / (name if name.endswith(".json") else f"{name}.json")
    if os.path.isfile(file):
        return file
    names = shipped_deepspeed_configs()
    close = get_close_matches(name.removesuffix(".json"), names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise SettingsError(
        f"no DeepSpeed config {name!r}: {hint}it must be a JSON file or one of {', '.join(names)}."
    )


def is_own_deepspeed_json(name: str) -> bool:
    """True for a file of the user's, False for a name in `ds_configs`."""
    # Unlike Path.is_file, isfile takes names that are too long or lie in unreadable folders.
    return os.path.isfile(name)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written, keys that are written twice included."""


def _plain(value: Any, path: tuple[str, ...], twice: list[str]) -> Any:
    if isinstance(value, _Pairs):
        found: dict[str, Any] = {}
        for key, inner in value:
            if key in found:
                twice.append(".".join((*path, key)))
            found[key] = _plain(inner, (*path, key), twice)
        return found
    if isinstance(value, list):
        return [_plain(item, (*path, str(n)), twice) for n, item in enumerate(value)]
    return value


def _shipped_folder() -> Path:
    return _INSTALLED_FOLDER if _INSTALLED_FOLDER.is_dir() else _CHECKOUT_FOLDER
