"""Compare a DeepSpeed JSON with DeepSpeed's key tree: names, types, limits, stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Optional

from lgpt.settings.deepspeed_schema import (
    BLOCK_STAGES,
    NOT_IN_0_18,
    STAGE3_ALIASES,
    TREE,
    Key,
    Tree,
)
from lgpt.settings.explain import shown
from lgpt.settings.sources import KeyPath

AUTO = "auto"


def misfits(
    config: Mapping[str, Any], fillable: frozenset[KeyPath], stage: Optional[int], version: str
) -> Iterator[tuple[KeyPath, str]]:
    """Everything in a DeepSpeed config that DeepSpeed's key tree does not allow or does not read.

    Args:
        config: The JSON, unresolved.
        fillable: Paths where "auto" is a placeholder that the run config fills.
        stage: The ZeRO stage, None when it is itself wrong.
        version: The installed DeepSpeed, "" when unknown.

    Yields:
        The path, and the rest of a sentence that begins with the path and its value.
    """
    reported: list[KeyPath] = []
    for path, text in _misfits_of_keys(config, fillable, stage, version):
        reported.append(path)
        yield path, text
    for path, text in [*_written_twice(config), *_switched_off(config)]:
        if not any(other[: len(path)] == path for other in reported):
            yield path, text


def _misfits_of_keys(
    config: Mapping[str, Any], fillable: frozenset[KeyPath], stage: Optional[int], version: str
) -> Iterator[tuple[KeyPath, str]]:
    for path, value, node in _walk(config, TREE, ()):
        if node is None:
            yield path, _unknown(path)
        elif not isinstance(node, Key):
            if not isinstance(value, dict):
                yield path, 'must be a block: {"...": ...}.'
            elif _is_idle_block(path, stage):
                yield path, _stage_rule(BLOCK_STAGES[path[-1]], stage)
        elif version.startswith("0.18.") and ".".join(path) in NOT_IN_0_18:
            yield path, f"is not known to the installed DeepSpeed {version}; remove it or upgrade."
        elif text := _value_rule(path, value, node, fillable):
            yield path, text
        elif stage is not None and stage not in node.stages:
            yield path, _stage_rule(node.stages, stage)


def _written_twice(config: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    for name in STAGE3_ALIASES:
        if name in zero and f"stage3_{name}" in zero:
            yield ("zero_optimization", name), f"is written twice, also as stage3_{name}; keep one."


def _switched_off(config: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Blocks of which nothing is read, because their `enabled` is false or absent."""
    for name, block in config.items():
        keys = TREE.get(name)
        if not isinstance(keys, Mapping) or "enabled" not in keys or not isinstance(block, dict):
            continue
        if name == "bf16" or block.get("enabled", False) is not False:
            continue  # bf16: the run config decides
        if idle := [key for key in block if key != "enabled"]:
            can_be_on = keys["enabled"].idle is None
            way_out = ' or write "enabled": true' if can_be_on else ""
            text = f"is off, so nothing reads {', '.join(idle)} in it; remove the block{way_out}."
            yield (name,), text


def _walk(
    config: Mapping[str, Any], tree: Tree, prefix: KeyPath
) -> Iterator[tuple[KeyPath, Any, Any]]:
    """(path, value, schema node or None) for every key, blocks before what is in them."""
    for name, value in config.items():
        path = (*prefix, name)
        node = tree.get(name)
        yield path, value, node
        if isinstance(node, Mapping) and isinstance(value, dict):
            yield from _walk(value, node, path)


def _is_idle_block(path: KeyPath, stage: Optional[int]) -> bool:
    return stage is not None and stage not in BLOCK_STAGES.get(path[-1], (stage,))


def _stage_rule(stages: tuple[int, ...], stage: Optional[int]) -> str:
    names = " or ".join(map(str, stages))
    return f"has no effect at ZeRO stage {stage}, only at {names}; remove it or change the stage."


def _unknown(path: KeyPath) -> str:
    siblings: Tree = TREE
    for key in path[:-1]:
        inner = siblings[key]
        assert isinstance(inner, Mapping), f"{path} lies inside a value"
        siblings = inner
    start = "is not a DeepSpeed key, and DeepSpeed would ignore or refuse it: "
    if path == ("mlflow",):
        return f"{start}the `tracking` section of the run config owns MLflow; remove it."
    homes = [other for other in _paths(TREE, ()) if other[-1] == path[-1]]
    if homes:
        return f"{start}it belongs at {' or '.join('.'.join(home) for home in homes)}."
    if close := get_close_matches(path[-1], list(siblings), n=1):
        return f"{start}did you mean {'.'.join((*path[:-1], close[0]))}?"
    by_name = {other[-1]: other for other in _paths(TREE, ())}
    if close := get_close_matches(path[-1], list(by_name), n=1, cutoff=0.75):
        return f"{start}did you mean {'.'.join(by_name[close[0]])}?"
    return f"{start}remove it."


def _paths(tree: Tree, prefix: KeyPath) -> Iterator[KeyPath]:
    for name, node in tree.items():
        yield (*prefix, name)
        if isinstance(node, Mapping):
            yield from _paths(node, (*prefix, name))


def _value_rule(path: KeyPath, value: Any, key: Key, fillable: frozenset[KeyPath]) -> str:
    """The sentence's rest when a value is wrong, else ""."""
    if key.refused and not _has_idle(key):
        return f"is refused: {key.refused}"
    if value is None and key.nullable:
        return ""
    if key.refused and (not _has_kind(value, key.kind) or value != key.idle):
        return f"must be {shown(key.idle)} or absent: {key.refused}"
    if value == AUTO:
        if path in fillable or key.is_auto:
            return ""
        return f"is left over: nothing fills it here; write {_allowed(key)}."
    if not _has_kind(value, key.kind):
        return f"must be {_allowed(key)}."
    return _limit_rule(value, key)


def _has_idle(key: Key) -> bool:
    return key.idle is not None or key.nullable


def _has_kind(value: Any, kind: str) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("int", "float"):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (kind == "float" or isinstance(value, int) or value.is_integer())
    if kind == "list":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    types: dict[str, type] = {"text": str, "block": dict}
    return isinstance(value, types[kind])


def _limit_rule(value: Any, key: Key) -> str:
    is_low = key.low is not None and value < key.low
    is_low = is_low or (key.above is not None and value <= key.above)
    if is_low or (key.high is not None and value > key.high):
        return f"must be {_allowed(key)}{f': {key.note}' if key.note else ''}."
    if key.choices and value not in key.choices:
        close = get_close_matches(str(value), [str(choice) for choice in key.choices], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return f"must be {_allowed(key)}.{hint}"
    return ""


def _allowed(key: Key) -> str:
    """`a whole number of at least 1`, `one of none, cpu, nvme`."""
    names = {
        "bool": "true or false",
        "int": "a whole number",
        "float": "a number",
        "text": "text in quotes",
        "list": "a list of texts",
        "block": 'a block: {"...": ...}',
    }
    text = f"one of {', '.join(map(str, key.choices))}" if key.choices else names[key.kind]
    if key.low is not None and key.high is not None:
        text += f" from {key.low:g} to {key.high:g}"
    elif key.low is not None:
        text += f" of at least {key.low:g}"
    elif key.above is not None:
        text += f" above {key.above:g}"
    return text + (" or null" if key.nullable else "")
