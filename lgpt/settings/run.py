"""Load and dump the settings of a run: defaults <- YAML <- environment <- command line.

Relative paths inside a config (runs_folder, data.source, latent_cache, ...) are relative to the
folder in which the command is started, not to the config file; only `extends` and `deepspeed` look
beside the file first.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import yaml
from pydantic import ValidationError

from lgpt.core.errors import SettingsError
from lgpt.settings.checks import contradictions, settings_without_effect
from lgpt.settings.deepspeed import deepspeed_problems
from lgpt.settings.deepspeed_file import is_own_deepspeed_json
from lgpt.settings.explain import (
    flags_where_numbers_belong,
    invalid_values,
    located,
    section_of,
    sections_of,
    take_typed_text,
    unknown_keys,
    values_where_sections_belong,
)
from lgpt.settings.phases import Phase1, Phase2, Phase3, RunSettings
from lgpt.settings.sources import KeyPath, Sources, find_config, read_sources

_PHASES: dict[int, type[Union[Phase1, Phase2, Phase3]]] = {1: Phase1, 2: Phase2, 3: Phase3}
_DEEPSPEED_COPY = "ds_source.json"
# Stand-ins for required values that are missing or wrong, so that the other checks can still run.
_STAND_INS: dict[KeyPath, Any] = {("name",): "unnamed", ("training", "max_steps"): 10**9}


def load_run_settings(
    path: Union[str, Path],
    overrides: Sequence[str] = (),
    environ: Optional[Mapping[str, str]] = None,
    world_size: int = 1,
    check_deepspeed: bool = True,
) -> RunSettings:
    """Read a run config and refuse it with every mistake in one message.

    Args:
        path: A YAML file, a run folder, or a shipped name such as `phase3_500m` or
            `demo/phase3_shapes`.
        overrides: `section.key=value` texts; values are YAML.
        environ: Where `LGPT_SECTION__KEY` variables are looked up; default `os.environ`.
        world_size: Ranks that will train; the batch must divide over them.
        check_deepspeed: False for a run that is only read: its batch need not fit and its DeepSpeed
            config need not be there.

    Returns:
        Phase1, Phase2 or Phase3, frozen.

    Raises:
        SettingsError: All problems of the run config and of its DeepSpeed config, each with its
            place.
    """
    sources = read_sources(path, overrides, os.environ if environ is None else environ)
    problems = list(sources.problems)
    model = _phase_model(sources, problems)
    others = {f"phase {n}": other for n, other in _PHASES.items() if other is not model}
    take_typed_text(sources, model)
    _find_deepspeed_beside(sources)
    texts, unknown = unknown_keys(sources, model, others)
    problems.extend(texts)
    for key_path in unknown:
        sources.remove(key_path)

    run, invalid = _validated(sources, model)
    problems.extend(text for _, text in invalid)
    bad_paths = [*sources.unreadable, *(key_path for key_path, _ in invalid)]
    if "phase" not in sources.tree:
        bad_paths.append(("phase",))
    run = _without_inert(run, sources, problems, bad_paths)
    found = contradictions(run, sources)
    if check_deepspeed:
        found += deepspeed_problems(run, world_size, sources)
    problems.extend(text for paths, text in found if not _touches(paths, bad_paths))
    if problems:
        raise SettingsError(problems, heading=str(find_config(path)))
    return run


def dump_run_settings(run: RunSettings) -> str:
    """YAML of every value that has an effect; loads to an equal object."""
    tree = run.model_dump(mode="json")
    for path, _ in settings_without_effect(run):
        _remove(tree, path)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def run_folder_texts(run: RunSettings) -> dict[str, str]:
    """What a run folder holds to be run again: config.yaml, and the user's DeepSpeed JSON.

    The JSON is copied unresolved, so that another number of ranks can take it, and the config names
    the copy, so that it can be moved and read from anywhere.
    """
    if not is_own_deepspeed_json(run.deepspeed_config):
        return {"config.yaml": dump_run_settings(run)}
    source = Path(run.deepspeed_config).read_text(encoding="utf-8")
    run = run.model_copy(update={"deepspeed": _DEEPSPEED_COPY})
    return {_DEEPSPEED_COPY: source, "config.yaml": dump_run_settings(run)}


def _find_deepspeed_beside(sources: Sources) -> None:
    """`deepspeed: my.json` in a file means the one beside it, if there is one."""
    place, name = sources.places.get(("deepspeed",)), sources.tree.get("deepspeed")
    if place is not None and place.folder is not None and name and isinstance(name, str):
        beside = str(place.folder / name)
        if is_own_deepspeed_json(beside):
            sources.put(("deepspeed",), beside, place)


def _phase_model(sources: Sources, problems: list[str]) -> type[Union[Phase1, Phase2, Phase3]]:
    """The phase that validates the tree; when `phase` is wrong, the one whose keys fit best."""
    phase = sources.tree.get("phase")
    if type(phase) is int and phase in _PHASES:
        return _PHASES[phase]
    if phase is None:
        problems.append(
            "phase is missing: set 1 (transformer on a pretrained VQ-VAE), 2 (the VQ-VAE) or "
            "3 (transformer on your VQ-VAE)."
        )
    else:
        problems.append(f"{located(('phase',), sources)} must be 1, 2 or 3.")
    if "phase" in sources.tree:
        sources.remove(("phase",))
    return min(_PHASES.values(), key=lambda model: len(unknown_keys(sources, model, {})[0]))


def _validated(
    sources: Sources, model: type[Union[Phase1, Phase2, Phase3]]
) -> tuple[RunSettings, list[tuple[KeyPath, str]]]:
    """A valid tree whatever was written, with what had to be left out for it."""
    invalid = values_where_sections_belong(sources, model)
    bad_sections = [path for path, _ in invalid]
    unsaid = [*bad_sections, *sources.unreadable]
    for path in sections_of(model):
        _open_section(sources, path, is_wrong=path in bad_sections)
    for name, field in model.model_fields.items():
        if section_of(field.annotation) is not None and field.is_required():
            sources.tree.setdefault(name, {})
    flags = flags_where_numbers_belong(sources, model)
    invalid.extend(flags)
    _repair(sources, [path for path, _ in flags])
    while True:
        try:
            return model.model_validate(sources.tree), invalid
        except ValidationError as error:
            found = invalid_values(error, sources)
            # What a wrong section lacks, or what could not be read, is not missing as well.
            invalid.extend(f for f in found if not _lies_in(f[0], unsaid))
            before = copy.deepcopy(sources.tree)
            _repair(sources, [path for path, _ in found])
            assert sources.tree != before, f"nothing repairs {[path for path, _ in found]}"


def _open_section(sources: Sources, path: KeyPath, is_wrong: bool) -> None:
    """`data:` with nothing under it, or with something wrong, is an empty section from here on."""
    parent = sources.tree
    for key in path[:-1]:
        parent = parent.get(key, {})
    if is_wrong or (path[-1] in parent and parent[path[-1]] in (None, {})):
        for known in sources.written(path):
            del sources.places[known]
        parent[path[-1]] = {}


def _repair(sources: Sources, paths: Sequence[KeyPath]) -> None:
    for path in paths:
        while path and path[-1].isdigit():
            path = path[:-1]
        if path in _STAND_INS:
            parent = sources.value(path[:-1]) if path[:-1] else sources.tree
            parent[path[-1]] = _STAND_INS[path]
        else:
            _remove(sources.tree, path)


def _remove(tree: dict[str, Any], path: KeyPath) -> None:
    for key in path[:-1]:
        tree = tree.get(key, {})
    tree.pop(path[-1], None)


def _lies_in(path: KeyPath, prefixes: Sequence[KeyPath]) -> bool:
    return any(path[: len(prefix)] == prefix for prefix in prefixes)


def _touches(paths: Sequence[KeyPath], bad_paths: Sequence[KeyPath]) -> bool:
    return any(
        path[: len(bad)] == bad or bad[: len(path)] == path for path in paths for bad in bad_paths
    )


def _without_inert(
    run: RunSettings, sources: Sources, problems: list[str], bad_paths: Sequence[KeyPath]
) -> RunSettings:
    """Drop inherited values that a later layer made void; others without effect are mistakes.

    `conditioning=unconditional` on the command line voids the file's `text` section without a word;
    a file that says both is contradictory.
    """
    dropped: set[KeyPath] = set()
    while True:
        void = {
            path: reason
            for prefix, reason in settings_without_effect(run)
            for path in sources.written(prefix)
            if path not in dropped
        }
        # A switch without effect goes first: what it voided has one again, perhaps.
        now = {path: reason for path, reason in void.items() if reason.switch not in void}
        if not now:
            return run
        for path, reason in now.items():
            switch = sources.place(reason.switch)
            is_inherited = switch is not None and sources.places[path].layer < switch.layer
            if not is_inherited and not _touches([path, reason.switch], bad_paths):
                problems.append(f"{located(path, sources)} has no effect {reason.text}; remove it.")
            _remove(sources.tree, path)
        dropped.update(now)
        run = type(run).model_validate(sources.tree)
