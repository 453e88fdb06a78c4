"""Mistakes in settings as sentences: what, the value, where it was written, what is allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Optional, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lgpt.settings.section import Section
from lgpt.settings.sources import KeyPath, Sources


def dotted(path: KeyPath) -> str:
    """`("data", "crops")` as `data.crops`; list positions in brackets."""
    text = ".".join(path)
    for key in path:
        if key.isdigit():
            text = text.replace(f".{key}", f"[{key}]", 1)
    return text


def shown(value: Any) -> str:
    """A value as one would write it in YAML, cut when long."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def located(path: KeyPath, sources: Sources, value: Any = None) -> str:
    """`training.max_steps = -5 (phase1.yaml:12)`; for a value nobody wrote `... (default)`."""
    place = sources.place(path)
    if place is not None:
        with suppress(KeyError):
            value = sources.value(path)
    return f"{dotted(path)} = {shown(value)} ({place.text if place else 'default'})"


def section_of(annotation: Any) -> Optional[type[Section]]:
    """The settings section that a field holds, if it holds one."""
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation if is_section else None


def sections_of(model: type[Section], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every section of a settings tree, outer ones first."""
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield (*prefix, name)
            yield from sections_of(inner, (*prefix, name))


def fields_of(model: type[Section], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every value of a settings tree with its path, sections opened."""
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None:
            yield (*prefix, name), field
        else:
            yield from fields_of(inner, (*prefix, name))


def values_where_sections_belong(
    sources: Sources, model: type[Section]
) -> list[tuple[KeyPath, str]]:
    """`training: 5`, or `data=` on a command line, which would drop all that is inherited."""
    found = []
    for path in sections_of(model):
        wrong = [(value, place) for clash, value, place in sources.clashes if clash == path]
        place = sources.places.get(path)  # a section has none, its keys have
        if place is not None and not wrong:
            value = sources.value(path)
            if place.is_typed_text or value not in (None, {}):
                wrong.append((value, place))
        if wrong:
            value, place = wrong[-1]
            start = f"{dotted(path)} = {shown(value)} ({place.text})"
            how = f" Write {dotted(path)}.key=value." if place.is_typed_text else ""
            found.append((path, f"{start} must be a section with keys under it.{how}"))
    return found


def _plain_types(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an Optional or Union, else the annotation alone; without metadata."""
    options = get_args(annotation) if get_origin(annotation) is Union else (annotation,)
    return tuple(get_args(o)[0] if get_origin(o) is Annotated else o for o in options)


def take_typed_text(sources: Sources, model: type[Section]) -> None:
    """`name=1e5` means the text "1e5": give fields of text and paths what was typed."""
    for path, field in fields_of(model):
        place = sources.places.get(path)
        if place is None or place.raw is None:
            continue
        kinds, value = _plain_types(field.annotation), sources.value(path)
        if isinstance(place.raw, str) and (str in kinds or Path in kinds):
            if isinstance(value, (bool, int, float)):
                sources.put(path, place.raw, place)
        elif isinstance(place.raw, tuple) and tuple[str, ...] in kinds:
            typed = [
                raw if isinstance(item, (bool, int, float)) else item
                for raw, item in zip(place.raw, value)
            ]
            sources.put(path, typed, place)


def unknown_keys(
    sources: Sources, model: type[Section], other_models: Mapping[str, type[Section]]
) -> tuple[list[str], list[KeyPath]]:
    """Keys that no field takes, each with the nearest known one.

    Args:
        sources: The merged layers.
        model: The phase that validates them.
        other_models: The other phases by the name used in the texts (`phase 2`).

    Returns:
        The texts, and the paths to leave out when validation goes on.
    """
    known = [path for path, _ in fields_of(model)]
    elsewhere: dict[KeyPath, str] = {}
    for name, other in other_models.items():
        for path, _ in fields_of(other):
            elsewhere[path] = f"{elsewhere[path]} and {name}" if path in elsewhere else name
    texts, unknown = [], []
    for path in _unknown_paths(sources.tree, model):
        place = sources.place(path)
        hint = _nearest(path, model, known, elsewhere)
        where = place.text if place else "default"
        if place and place.text.startswith("environment") and "__" not in place.text:
            hint += " Section and key are joined by two underscores."
        texts.append(f"{dotted(path)} ({where}) is not a setting of {_home(path)}: {hint}")
        unknown.append(path)
    return texts, unknown


def _home(path: KeyPath) -> str:
    return f"section {dotted(path[:-1])}" if len(path) > 1 else "a run"


def _unknown_paths(
    tree: Mapping[str, Any], model: type[Section], prefix: KeyPath = ()
) -> Iterator[KeyPath]:
    for key, value in tree.items():
        field = model.model_fields.get(key)
        inner = section_of(field.annotation) if field else None
        if field is None:
            yield (*prefix, key)
        elif inner is not None and isinstance(value, dict):
            yield from _unknown_paths(value, inner, (*prefix, key))


def _nearest(
    path: KeyPath,
    model: type[Section],
    known: list[KeyPath],
    elsewhere: Mapping[KeyPath, str],
) -> str:
    key = path[-1]
    for other, phase in elsewhere.items():
        if other[: len(path)] == path:
            return f"it belongs to {phase}; remove it, or change `phase`."
    siblings = _keys_of_section(path[:-1], model)
    by_joined = {"_".join(other): other for other in known}
    if close := get_close_matches("_".join(path), list(by_joined), n=1, cutoff=0.9):
        # LGPT_TRAINING_MAX_STEPS for LGPT_TRAINING__MAX_STEPS; trainning.max_steps
        return f"did you mean {dotted(by_joined[close[0]])}?"
    if close := get_close_matches(key, siblings, n=1, cutoff=0.7):
        return f"did you mean {dotted((*path[:-1], close[0]))}?"
    same_key = [dotted(other) for other in known if other[-1] == key]
    if same_key:
        return f"it belongs to another section: {' or '.join(same_key)}."
    for other, phase in elsewhere.items():
        if other[-1] == key:
            return f"in {phase} it is {dotted(other)}; remove it, or change `phase`."
    by_key = {other[-1]: other for other in reversed(known)}
    if close := get_close_matches(key, list(by_key), n=1, cutoff=0.75):
        return f"did you mean {dotted(by_key[close[0]])}?"
    return f"known there are {', '.join(siblings)}."


def _keys_of_section(path: KeyPath, model: type[Section]) -> list[str]:
    section = model
    for key in path:
        inner = section_of(section.model_fields[key].annotation)
        assert inner is not None, f"{path} is no section"
        section = inner
    return list(section.model_fields)


def invalid_values(error: ValidationError, sources: Sources) -> list[tuple[KeyPath, str]]:
    """Pydantic's findings as (path, text), each with place, value and what is allowed."""
    found = []
    for detail in error.errors(include_url=False):
        path = tuple(str(key) for key in detail["loc"])
        if detail["type"] == "missing":
            section = sources.place(path[:-1])
            where = f" (section at {section.text})" if section else ""
            found.append((path, f"{dotted(path)} is missing{where}: it has no default; set it."))
            continue
        rule = _rule(detail["type"], detail.get("ctx", {}), detail["input"], detail["msg"])
        found.append((path, f"{located(path, sources, detail['input'])} {rule}"))
    return found


def _rule(kind: str, limits: Mapping[str, Any], value: Any, message: str) -> str:
    """What is allowed, after pydantic's error type and its context."""
    if kind == "literal_error":
        return _literal_rule(limits["expected"], value)
    rules = {
        "greater_than_equal": "must be at least {ge}.",
        "greater_than": "must be greater than {gt}.",
        "less_than_equal": "must be at most {le}.",
        "less_than": "must be less than {lt}.",
        "multiple_of": "must be a multiple of {multiple_of}.",
        "string_pattern_mismatch": "must match {pattern} (letters, digits, '.', '_' and '-').",
        "string_too_short": "must not be empty.",
        "string_too_long": "must have at most {max_length} characters.",
        "too_short": "must have at least {min_length} entries.",
        "finite_number": "must be a finite number.",
        "string_type": 'must be text; put it in quotes ("...").',
        "path_type": "must be a path.",
        "tuple_type": "must be a list, for example [a, b].",
    }
    if kind == "value_error":  # of a validator of ours
        return message.removeprefix("Value error, ") + "."
    if kind in rules:
        return rules[kind].format(**limits)
    if kind.startswith("int"):
        return "must be a whole number."
    if kind.startswith("float"):
        return "must be a number."
    if kind.startswith("bool"):
        return "must be true or false."
    return f"is refused: {message}."


def _literal_rule(expected: str, value: Any) -> str:
    choices = [text.strip("'") for text in expected.replace(" or ", ", ").split(", ")]
    close = get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"must be one of {', '.join(choices)}.{hint}"


def flags_where_numbers_belong(sources: Sources, model: type[Section]) -> list[tuple[KeyPath, str]]:
    """`max_steps: yes` is 1 to pydantic; here it is a mistake."""
    found = []
    for path, field in fields_of(model):
        is_number = {int, float, tuple[int, ...]} & set(_plain_types(field.annotation))
        if path not in sources.places or not is_number:
            continue
        values = {path: sources.value(path)}
        if isinstance(values[path], list):
            values.update({(*path, str(n)): item for n, item in enumerate(values[path])})
        for where, value in values.items():
            if isinstance(value, bool):
                start = located(where, sources, value)
                found.append((where, f"{start} must be a number, not true or false."))
    return found
