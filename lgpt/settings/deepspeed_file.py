"""Find and read a DeepSpeed JSON, by its name in `ds_configs` or by its path."""

from __future__ import annotations

import json
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
    file = Path(name)
    if not file.is_file():
        file = _shipped_folder() / (name if name.endswith(".json") else f"{name}.json")
    if not file.is_file():
        names = shipped_deepspeed_configs()
        close = get_close_matches(name.removesuffix(".json"), names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SettingsError(
            f"no DeepSpeed config {name!r}: {hint}it must be a JSON file or one of "
            f"{', '.join(names)}."
        )
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.extend(key for key in dict.fromkeys(keys) if keys.count(key) > 1)
        return dict(pairs)

    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{file}:{error.lineno} is not JSON: {error.msg}.") from None
    if twice:
        raise SettingsError([f"{file}: key {key!r} is written twice; keep one." for key in twice])
    if not isinstance(config, dict):
        raise SettingsError(f"{file} must hold one JSON object.")
    return config


def _shipped_folder() -> Path:
    return _INSTALLED_FOLDER if _INSTALLED_FOLDER.is_dir() else _CHECKOUT_FOLDER
