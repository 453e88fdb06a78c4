"""Where settings come from: YAML files with `extends`, the environment, the command line.

Later layers win: parents of a file, the file, `LGPT_SECTION__KEY` variables, `section.key=value`.
Every value keeps its place, so that an error can say where to mend it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from lgpt.core.errors import SettingsError

KeyPath = tuple[str, ...]
Raw = Union[None, str, tuple[str, ...]]  # of a plain value, or of a list of plain values

CONFIGS_FOLDER = Path(__file__).resolve().parents[1] / "configs"
ENVIRONMENT_PREFIX = "LGPT_"
# Read by the test suite and by launch/*.sh.
_NOT_SETTINGS = ("LGPT_REQUIRE_", "LGPT_ALLOW_")
_SHIPPED_PREFIX = "lgpt/configs/"
_DEEPEST_NESTING = 12


@dataclass(frozen=True)
class Place:
    """Where a value was written, and how late its layer comes."""

    text: str
    layer: int
    is_typed_text: bool = False  # from the environment or the command line, not from YAML
    raw: Raw = None  # as it was typed, before YAML made 100000.0 of 1e5
    folder: Optional[Path] = None  # of the file that says it


@dataclass
class Sources:
    """All layers merged: plain values, the place of each, and what was wrong with their form."""

    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    # Plain values that replaced a mapping, or were replaced by one: at most one of both was right.
    clashes: list[tuple[KeyPath, Any, Place]] = field(default_factory=list)
    # Values that are no plain YAML; `problems` says why.
    unreadable: list[KeyPath] = field(default_factory=list)

    def place(self, path: KeyPath) -> Optional[Place]:
        """Place of a value, of what holds it, or of the last thing in it; None for a default."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        inner = [self.places[known] for known in (self.written(path) if path else [])]
        return max(inner, key=lambda place: place.layer, default=None)

    def value(self, path: KeyPath) -> Any:
        """The value written at a path; KeyError when nothing was."""
        found: Any = self.tree
        for key in path:
            if not isinstance(found, dict):
                raise KeyError(path)
            found = found[key]
        return found

    def written(self, prefix: KeyPath) -> list[KeyPath]:
        """Paths of all values written at or under a prefix, in the order of the layers."""
        return [path for path in self.places if path[: len(prefix)] == prefix]

    def remove(self, path: KeyPath) -> None:
        """Forget a value and everything under it."""
        parent = self.value(path[:-1]) if path[:-1] else self.tree
        parent.pop(path[-1], None)
        for known in self.written(path):
            del self.places[known]

    def put(self, path: KeyPath, value: Any, place: Place) -> None:
        """Set a value; mappings are merged key by key, everything else is replaced.

        Nothing (`data:` with only a comment under it, or `{}`) leaves a mapping as it is; on a
        command line it was meant to do something, so it counts as a plain value there.
        """
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                self.put((*path, key), inner, place)
            return
        is_nothing = value in (None, {}) and not place.is_typed_text
        node = self.tree
        for depth, key in enumerate(path[:-1], 1):
            self._open(node, path[:depth])
            node = node[key]
        if isinstance(node.get(path[-1]), dict):
            if is_nothing:
                return
            self.clashes.append((path, value, place))
        for known in self.written(path):
            del self.places[known]
        node[path[-1]] = value
        self.places[path] = place

    def _open(self, node: dict[str, Any], path: KeyPath) -> None:
        """Make the value at a path a mapping, ready for keys."""
        value = node.get(path[-1])
        if isinstance(value, dict) and (value or path not in self.places):
            return
        place = self.places.pop(path, None)
        if place is not None and (value not in (None, {}) or place.is_typed_text):
            self.clashes.append((path, value, place))
        node[path[-1]] = {}


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 as a number; 2026-01-01, 010 and 10:00:00 are text (1.1 has 8 and 36000)."""


_OWN_PATTERNS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0b[01_]+)",
    "tag:yaml.org,2002:float": r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in (*_OWN_PATTERNS, "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _OWN_PATTERNS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list("-+.0123456789"))


def read_sources(
    config: Union[str, Path], overrides: Sequence[str], environ: Mapping[str, str]
) -> Sources:
    """Merge a config file with its parents, the environment and the command line.

    Args:
        config: A file, a folder that holds `config.yaml`, or a shipped name such as
            `demo/phase3_shapes`.
        overrides: `section.key=value` texts, values in YAML.
        environ: `LGPT_SECTION__KEY` variables are taken, all others ignored.

    Raises:
        SettingsError: A file is missing or is not YAML; nothing else can be said then.
    """
    sources = Sources()
    for layer, (file, mapping) in enumerate(_chain(find_config(config))):
        _read_file(file, mapping, layer, sources)
    layer = 1000  # after all files
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX) and not name.startswith(_NOT_SETTINGS):
            path = tuple(name[len(ENVIRONMENT_PREFIX) :].lower().split("__"))
            _put_text(sources, path, environ[name], f"environment variable {name}", layer)
    for text in overrides:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().lstrip("-").split("."))
        if not equals or not all(path):
            sources.problems.append(
                f"{text!r} (command line): an override is written section.key=value, "
                "for example training.max_steps=100."
            )
            continue
        _put_text(sources, path, value, "command line", layer + 1)
    return sources


def _put_text(sources: Sources, path: KeyPath, text: str, origin: str, layer: int) -> None:
    if path == ("extends",):
        sources.problems.append(f"extends ({origin}): only a config file can say `extends`.")
        return
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        start = f"{'.'.join(path)} = {_cut(text)!r} ({origin})"
        sources.problems.append(f"{start}: not YAML: {_why(error)}.")
        sources.unreadable.append(path)
        return
    if node is None:
        sources.put(path, None, Place(origin, layer, is_typed_text=True))
        return
    reader = _NodeReader(origin, is_one_line=True)
    value = reader.plain(node, path)
    sources.problems.extend(reader.problems)
    sources.unreadable.extend(reader.unreadable)
    for inner, leaf in _leaves({path[-1]: value}, path[:-1]):
        if inner not in reader.unreadable:
            place = Place(origin, layer, is_typed_text=True, raw=reader.raws.get(inner))
            sources.put(inner, leaf, place)


def _why(error: Exception) -> str:
    """What YAML did not like, in one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    context, problem = getattr(error, "context", None), getattr(error, "problem", None)
    if context and str(problem).startswith("but "):
        problem = f"{context}, {problem}"
    return str(problem or context or error).splitlines()[0]


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def find_config(config: Union[str, Path], extended_by: Optional[Path] = None) -> Path:
    """The file meant by a path, a run folder or a shipped name (with or without `.yaml`).

    Args:
        config: What was given.
        extended_by: The file that says `extends: config`; it is never meant itself.
    """
    path = Path(config)
    for file in (path, path / "config.yaml"):
        if _is_other_file(file, extended_by):
            return file
    name = str(config).removeprefix("./").removeprefix(_SHIPPED_PREFIX)
    shipped = CONFIGS_FOLDER / (name if name.endswith(".yaml") else f"{name}.yaml")
    if _is_other_file(shipped, extended_by) and not Path(name).is_absolute():
        return _short(shipped)
    # `base` is there to be extended, and no run.
    names = [known for known in shipped_configs() if known != "base" or extended_by is not None]
    close = get_close_matches(name.removesuffix(".yaml"), names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise SettingsError(
        f"no config file {_cut(str(config))!r}: {hint}it must be a YAML file, a run folder, "
        f"or one of the shipped configs {', '.join(names)}."
    )


def _is_other_file(file: Path, than: Optional[Path]) -> bool:
    # Unlike Path.is_file, isfile takes names that are too long or lie in unreadable folders.
    return os.path.isfile(file) and (than is None or not os.path.samefile(file, than))


def _short(file: Path) -> Path:
    """Relative to the current folder when it lies under it, for messages."""
    try:
        return file.relative_to(Path.cwd())
    except ValueError:
        return file


def shipped_configs() -> list[str]:
    """Names of the configs inside the package, without `.yaml`."""
    files = CONFIGS_FOLDER.rglob("*.yaml")
    return sorted(file.relative_to(CONFIGS_FOLDER).with_suffix("").as_posix() for file in files)


def _chain(file: Path) -> list[tuple[Path, yaml.MappingNode]]:
    """The file and its parents, oldest ancestor first."""
    chain: list[tuple[Path, yaml.MappingNode]] = []
    while True:
        if file.resolve() in (known.resolve() for known, _ in chain):
            circle = " -> ".join(str(known) for known in [*(known for known, _ in chain), file])
            raise SettingsError(f"extends goes in a circle: {circle}; remove one of them.")
        mapping = _mapping_of(file)
        chain.append((file, mapping))
        named = next((node for key, node in mapping.value if key.value == "extends"), None)
        if named is None:
            return chain[::-1]
        place = f"{file}:{named.start_mark.line + 1}"
        if not isinstance(named, yaml.ScalarNode) or not named.value:
            raise SettingsError(
                f"extends ({place}) must be one name: a file beside {file} or a shipped config."
            )
        beside = [file.parent / named.value, file.parent / f"{named.value}.yaml"]
        others = [path for path in beside if _is_other_file(path, file)]
        try:
            file = others[0] if others else find_config(named.value, extended_by=file)
        except SettingsError as error:
            raise SettingsError(f"extends = {named.value!r} ({place}): {error}") from None


def _mapping_of(file: Path) -> yaml.MappingNode:
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingsError(f"{file}{line} is not YAML: {_why(error)}.") from None
    except RecursionError:
        raise SettingsError(f"{file} is nested too deeply for settings.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from None
    if node is None:
        node = yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(node, yaml.MappingNode):
        raise SettingsError(f"{file} must hold `section:` lines at its top.")
    return node


def _read_file(file: Path, mapping: yaml.MappingNode, layer: int, sources: Sources) -> None:
    name = str(file)
    reader = _NodeReader(name)
    tree = reader.plain(mapping)
    tree.pop("extends", None)
    sources.problems.extend(reader.problems)
    sources.unreadable.extend(reader.unreadable)
    for path, value in _leaves(tree):
        if path not in reader.unreadable:
            raw = reader.raws.get(path)
            place = Place(f"{name}:{reader.lines[path]}", layer, raw=raw, folder=file.parent)
            sources.put(path, value, place)


def _leaves(tree: Mapping[str, Any], prefix: KeyPath = ()) -> list[tuple[KeyPath, Any]]:
    found: list[tuple[KeyPath, Any]] = []
    for key, value in tree.items():
        path = (*prefix, key)
        if isinstance(value, dict) and value:
            found.extend(_leaves(value, path))
        else:
            found.append((path, value))
    return found


class _NodeReader:
    """YAML nodes to plain values, noting lines and what was typed; mistakes are problems.

    Args:
        origin: A file, or what a text came from.
        is_one_line: It is such a text, and lines tell nothing.
    """

    def __init__(self, origin: str, is_one_line: bool = False) -> None:
        self.origin, self.is_one_line = origin, is_one_line
        self.lines: dict[KeyPath, int] = {}
        self.raws: dict[KeyPath, Raw] = {}
        self.problems: list[str] = []
        self.unreadable: list[KeyPath] = []
        self._scalars = _Loader("")

    def plain(self, node: yaml.Node, path: KeyPath = ()) -> Any:
        if len(path) > _DEEPEST_NESTING:
            raise SettingsError(
                f"{self.origin}: {'.'.join(path)} is nested too deeply for settings."
            )
        self.lines[path] = node.start_mark.line + 1 if node.start_mark else 1
        if isinstance(node, yaml.MappingNode):
            return self._plain_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            if all(isinstance(item, yaml.ScalarNode) for item in node.value):
                self.raws[path] = tuple(item.value for item in node.value)
            return [self.plain(item, (*path, str(n))) for n, item in enumerate(node.value)]
        self.raws[path] = node.value
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
            # PyYAML looks `!!bool maybe` up in a dict and takes `!!timestamp x` for a match.
            start = f"{'.'.join(path)} = {_cut(node.value)} ({self._place(self.lines[path])})"
            self.problems.append(f"{start} is not a plain value: {_why(error)}.")
            self.unreadable.append(path)
            return None

    def _place(self, line: int) -> str:
        return self.origin if self.is_one_line else f"{self.origin}:{line}"

    def _plain_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                where = ".".join(path) or "the top"
                self.problems.append(f"{where} ({self._place(line)}): a key must be one word.")
                continue
            key = str(key_node.value)
            if key == "<<":
                self.problems.append(
                    f"{'.'.join((*path, key))} ({self._place(line)}): YAML's merge keys are not "
                    "read; write the keys out, or put them into a file and name it in `extends`."
                )
                continue
            if key in mapping:
                self.problems.append(
                    f"{'.'.join((*path, key))} is written twice "
                    f"({self._place(first_lines[key])} and :{line}); keep one."
                )
                continue
            first_lines[key] = line
            mapping[key] = self.plain(value_node, (*path, key))
        return mapping
