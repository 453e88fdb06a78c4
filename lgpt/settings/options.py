"""`lgpt config options`: every setting of a run config, what it may be and what it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from rich.table import Table
from rich.text import Text

from lgpt.core.errors import SettingsError
from lgpt.settings.explain import dotted, fields_of, shown
from lgpt.settings.phases import RunSettings

_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "multiple of"}


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: `section.key`, as on a command line.
        value: In the run config at hand, a JSON value.
        allowed: What it may be.
        description: What it does.
    """

    name: str
    value: Any
    allowed: str
    description: str


def options_of(run: RunSettings, wanted: Sequence[str] = ()) -> list[Option]:
    """The settings of a run config.

    Args:
        run: The run config.
        wanted: Sections or settings, by name (`transformer`, `data.crops`) or by a part of one
            (`dropout`); none means all.

    Raises:
        SettingsError: One of the wanted names is in no setting.
    """
    options, values = [], run.model_dump(mode="json")
    for path, field in fields_of(type(run)):
        value: Any = values
        for key in path:
            value = value[key]
        allowed = _allowed(field.annotation, field.metadata)
        options.append(Option(dotted(path), value, allowed, field.description or ""))
    chosen: set[str] = set()
    for name in wanted:
        found = {o.name for o in options if o.name == name or o.name.startswith(f"{name}.")}
        found = found or {o.name for o in options if name in o.name}
        if not found:
            first_names = dict.fromkeys(o.name.split(".")[0] for o in options)
            raise SettingsError(
                f"no setting of phase {run.phase} has {name!r} in its name; there are "
                f"{', '.join(first_names)}."
            )
        chosen |= found
    return [option for option in options if not wanted or option.name in chosen]


def _allowed(annotation: Any, metadata: Sequence[Any]) -> str:
    """What a field may hold, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in inner)
    if origin is Union:  # of something and None, in settings
        of_value = next(each for each in inner if each is not type(None))
        return f"{_allowed(of_value, metadata)}, or null"
    if origin is Annotated:
        limits = [each for part in inner[1:] for each in getattr(part, "metadata", [part])]
        return _allowed(inner[0], [*metadata, *limits])
    bounds = [
        f"{sign} {_number(getattr(limit, name))}"
        for limit in metadata
        for name, sign in _BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    patterns = [limit.pattern for limit in metadata if getattr(limit, "pattern", None)]
    bounds += [f"that matches {pattern}" for pattern in patterns]
    if origin is tuple:
        is_filled = any(getattr(limit, "min_length", None) for limit in metadata)
        return f"{'list with some' if is_filled else 'list'}: {_allowed(inner[0], [])}"
    return " ".join([_KINDS[annotation], ", ".join(bounds)]).strip()


def _number(value: Union[int, float]) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def options_table(options: Sequence[Option], config: str) -> Table:
    """For people: sections apart, in the order of the config."""
    table = Table(title=f"Settings of {config}", title_justify="left")
    for column in ("setting", "value", "allowed", ""):
        table.add_column(column, overflow="fold")
    section = None
    for option in options:
        here = option.name.rpartition(".")[0]
        if section not in (None, here):
            table.add_section()
        section = here
        texts = (option.name, shown(option.value), option.allowed, option.description)
        table.add_row(*(Text(text) for text in texts))
    return table
