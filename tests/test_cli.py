"""What the command line itself decides: exit codes, and one sentence in place of a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def lgpt(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lgpt", *words],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", ["show", "validate"])
def test_the_text_encoder_may_be_named_where_a_config_is_looked_at(command):
    done = lgpt("config", command, "phase3_500m", "--text-encoder", "nobody/clip", "--ranks", "8")
    assert done.returncode == 0, done.stderr
    assert "text.encoder 'nobody/clip' is unknown" in done.stdout
    assert "parameters not counted" in done.stdout


def test_settings_are_listed_with_what_they_may_be():
    done = lgpt("config", "options", "demo/phase3_shapes", "blocks", "--json")
    assert done.returncode == 0, done.stderr
    assert "none | full | every_n | selective" in done.stdout
    listed = json.loads(done.stdout.splitlines()[-1])["settings"]
    assert [one["name"] for one in listed][:2] == ["blocks.checkpointing", "blocks.every"]
    assert listed[1]["value"] == 2


def test_both_players_of_phase_2_are_counted():
    words = ("loss.perceptual=none", "discriminator.start_step=20", "discriminator.warmup_steps=9")
    hinge = ("loss.adversarial=hinge", *words)
    done = lgpt("config", "validate", "demo/phase2_openmoji_f8", *hinge)
    assert done.returncode == 0, done.stderr
    assert "parameters, discriminator 2,765,633" in done.stdout


def test_the_demo_s_parameters_are_counted():
    done = lgpt("config", "validate", "demo/phase3_shapes", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert "not counted" not in done.stdout


@pytest.mark.parametrize(
    ("words", "environ", "text"),
    [
        (["config", "validate", "phase3_500m"], {"WORLD_SIZE": "x"}, None),
        (["train", "phase3_500m"], {"WORLD_SIZE": "x"}, "WORLD_SIZE = 'x' must be"),
        (["train", "phase3_500m"], {"RANK": "x"}, "RANK = 'x' must be"),
        (["sample", "m", "--unconditional", "1", "--seed", "-1"], {}, "--seed"),
        (["sample", "m", "--unconditional", "1", "--seed", str(2**63)], {}, "--seed"),
        (["evaluate", "m", "--seed", "99999999999999999999"], {}, "--seed"),
    ],
)
def test_mistakes_are_told_without_a_traceback(words, environ, text):
    done = lgpt(*words, **environ)
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if text is None else 2), done.stderr
    assert text is None or text in done.stderr
