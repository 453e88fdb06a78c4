"""Where settings come from: YAML files with `extends`, the environment, the command line.

Later layers win: parents of a file, the file, `LGPT_SECTION__KEY` variables, `section.key=value`.
Every value keeps its place, so that an error can say where to mend it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from lgpt.core.errors import SettingsError

KeyPath = tuple[str, ...]

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


@dataclass
class Sources:
    """All layers merged: plain values, the place of each, and what was wrong with their form."""

    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    # Plain values that replaced a mapping, or were replaced by one: at most one of both was right.
    clashes: list[tuple[KeyPath, Any, Place]] = field(default_factory=list)

    def place(self, path: KeyPath) -> Optional[Place]:
        """Place of a value, of what holds it, or of the first thing in it; None for a default."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        inner = self.written(path) if path else []
        return self.places[inner[0]] if inner else None

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
    """YAML with 1e-4 as a number and 2026-01-01 as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


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
            place = Place(f"environment variable {name}", layer, is_typed_text=True)
            _put_text(sources, path, environ[name], place)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            sources.problems.append(
                f"{text!r} (command line): an override is written section.key=value, "
                "for example training.max_steps=100."
            )
            continue
        place = Place("command line", layer + 1, is_typed_text=True)
        _put_text(sources, tuple(key.strip().lstrip("-").split(".")), value, place)
    return sources


def _put_text(sources: Sources, path: KeyPath, text: str, place: Place) -> None:
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        sources.problems.append(f"{'.'.join(path)} = {text!r} ({place.text}): not YAML: {error}")
        return
    if path == ("extends",):
        sources.problems.append(f"extends ({place.text}): only a config file can say `extends`.")
        return
    reader = _NodeReader(place.text)
    value = None if node is None else reader.plain(node)
    sources.problems.extend(reader.problems)
    sources.put(path, value, place)


def find_config(config: Union[str, Path]) -> Path:
    """The file meant by a path, a run folder or a shipped name (with or without `.yaml`)."""
    path = Path(config)
    if path.is_file():
        return path
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    name = str(config).removeprefix("./").removeprefix(_SHIPPED_PREFIX)
    shipped = CONFIGS_FOLDER / (name if name.endswith(".yaml") else f"{name}.yaml")
    if shipped.is_file() and not Path(name).is_absolute():
        return _short(shipped)
    names = shipped_configs()
    close = get_close_matches(name.removesuffix(".yaml"), names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise SettingsError(
        f"no config file {str(config)!r}: {hint}it must be a YAML file, a run folder, "
        f"or one of the shipped configs {', '.join(names)}."
    )


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
        try:
            file = next((path for path in beside if path.is_file()), None) or find_config(
                named.value
            )
        except SettingsError as error:
            raise SettingsError(f"extends = {named.value!r} ({place}): {error}") from None


def _mapping_of(file: Path) -> yaml.MappingNode:
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingsError(
            f"{file}{line} is not YAML: {error.problem or error.context}."
        ) from None
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
    for path, value in _leaves(tree):
        line = reader.lines.get(path)
        sources.put(path, value, Place(name if line is None else f"{name}:{line}", layer))


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
    """YAML nodes to plain values, noting lines; a key written twice is a problem."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[str] = []
        self._scalars = _Loader("")

    def plain(self, node: yaml.Node, path: KeyPath = ()) -> Any:
        if len(path) > _DEEPEST_NESTING:
            raise SettingsError(f"{self.file}: {'.'.join(path)} is nested too deeply for settings.")
        self.lines[path] = node.start_mark.line + 1 if node.start_mark else 1
        if isinstance(node, yaml.MappingNode):
            return self._plain_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*path, str(n))) for n, item in enumerate(node.value)]
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            line = self.lines[path]
            self.problems.append(
                f"{'.'.join(path)} ({self.file}:{line}): not a plain value: {error}"
            )
            return None

    def _plain_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in mapping:
                self.problems.append(
                    f"{'.'.join((*path, key))} is written twice ({self.file}:{first_lines[key]} "
                    "and "
                    f":{line}); keep one."
                )
                continue
            first_lines[key] = line
            mapping[key] = self.plain(value_node, (*path, key))
        return mapping
