"""`lgpt config options`: nothing is left out, and what it allows is what pydantic allows."""

from __future__ import annotations

import re

import pytest

from lgpt.core.errors import SettingsError
from lgpt.settings.explain import dotted, fields_of
from lgpt.settings.options import Option, options_of
from lgpt.settings.phases import RunSettings
from lgpt.settings.run import load_run_settings

CONFIGS = ("demo/phase1_shapes", "demo/phase2_openmoji_f8", "phase3_500m")


def _run(config: str, *overrides: str) -> RunSettings:
    return load_run_settings(config, list(overrides), environ={})


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_of_every_phase_is_described(config: str) -> None:
    run = _run(config)
    options = options_of(run)
    assert [o.name for o in options] == [dotted(path) for path, _ in fields_of(type(run))]
    assert [o.name for o in options if not o.description] == []


def _refused(option: Option) -> list[str]:
    """Values just outside of what is allowed."""
    values = []
    if " | " in option.allowed or option.allowed == "true or false":
        values.append("no-such-choice")
    if option.allowed.startswith(("number", "whole number")):
        values.append("a-word")
        past = {">=": -1.0, "<=": 1.0, ">": 0.0, "<": 0.0}
        bounds = re.findall(r"(>=|>|<=|<) ([0-9.]+)(?![0-9.e])", option.allowed)
        values += [f"{float(bound) + past[sign]:g}" for sign, bound in bounds]
    return values


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_not_allowed_is_refused(config: str) -> None:
    tried = [(o.name, value) for o in options_of(_run(config)) for value in _refused(o)]
    assert len(tried) > 50
    for name, value in tried:
        with pytest.raises(SettingsError, match=re.escape(name)):
            _run(config, f"{name}={value}")


def test_choices_are_all_there_and_null_only_where_it_may_be() -> None:
    options = {o.name: o for o in options_of(_run("phase3_500m"))}
    assert options["blocks.checkpointing"].allowed == "none | full | every_n | selective"
    assert options["transformer.mlp_hidden"].allowed == "whole number >= 1, or null"
    assert options["transformer.dropout"].allowed == "number >= 0, < 1"
    assert options["latent_cache"].allowed == "path, or null"
    assert options["sampling.prompts"].allowed == "list: text"
    assert options["sampling.guidance"].value == 4.0
    assert options["seed"].allowed == f"whole number >= 0, <= {2**62}"
    assert options["name"].allowed == "text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$"
    vqvae = {o.name: o for o in options_of(_run("demo/phase2_openmoji_f8"))}
    assert vqvae["vqvae.ch_mult"].allowed == "list with some: whole number"


def test_sections_settings_and_parts_of_names_choose() -> None:
    run = _run("phase3_500m")
    assert {o.name.split(".")[0] for o in options_of(run, ["blocks"])} == {"blocks"}
    assert [o.name for o in options_of(run, ["data.crops"])] == ["data.crops"]
    assert len(options_of(run, ["name"])) == 1, "a whole name, not a part of others"
    assert "transformer.dropout" in [o.name for o in options_of(run, ["seed", "dropout"])]
    with pytest.raises(
        SettingsError,
        match=r"has 'foo' in its name; there are name, runs_folder, .* blocks, sampling",
    ):
        options_of(run, ["blocks", "foo"])
