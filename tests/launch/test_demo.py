"""demo.sh with stand-ins for `lgpt` and `deepspeed`: order, skipping what is done, Ctrl-C."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lgpt.data.shapes import held_out_prompts, seen_prompts

ROOT = Path(__file__).resolve().parents[2]

# An environment that is made already: no pip, no torch.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in "-m pip"*) exit 0 ;; *"import torch"*) echo 2.0; exit 0 ;; esac
exec {sys.executable} "$@"
"""
# Makes what the real commands make; `deepspeed ... train CONFIG` waits for USR1 if told to.
STAND_IN = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
from lgpt import load_run_settings
words = sys.argv[1:]
with open("commands.txt", "a") as file:
    file.write(" ".join([os.path.basename(sys.argv[0]), *words]) + "\\n")
def touch(path):
    path = pathlib.Path(path); path.parent.mkdir(parents=True, exist_ok=True); path.touch()
if "train" in words:
    if os.environ.get("STAND_IN_WAITS"):
        told = []
        signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
        touch("is_training")
        while not told:
            time.sleep(0.05)
        sys.exit(75)
    touch(load_run_settings(words[-1]).run_folder / "DONE")
elif words[0] == "vqvae":
    touch(words[-1] + "/last.ckpt")
elif words[0] == "convert":
    touch(words[-1] + "/model.safetensors")
elif words[0] == "sample":
    touch(words[-1])
elif words[0] == "evaluate":
    touch(words[1] + "/evaluation.json")
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "lgpt").symlink_to(ROOT / "lgpt")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(
        f'export VIRTUAL_ENV="{tmp_path}/.venv" PATH="{programs}:$PATH"\n'
    )
    for name, text in (("python", PYTHON), ("lgpt", STAND_IN), ("deepspeed", STAND_IN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def start(clone: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "launch/demo.sh", *words],
        cwd=clone,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Tests started in the background ignore SIGINT, and a shell cannot trap what it inherits
        # as ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(clone: Path, *words: str) -> str:
    demo = start(clone, *words)
    output, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, output
    return output


def commands(clone: Path) -> list[str]:
    lines = (clone / "commands.txt").read_text().splitlines()
    numbers = r"--num_gpus \d --master_port \d+"
    return [re.sub(numbers, "--num_gpus N --master_port P", line) for line in lines]


TRAIN = "deepspeed --num_gpus N --master_port P --module lgpt train lgpt/configs/demo/"


def test_the_demo_walks_the_phases_and_does_not_redo_what_is_done(clone: Path):
    output = run(clone)
    done = commands(clone)
    assert [line.split()[1] if line.startswith("lgpt") else line for line in done] == [
        TRAIN + "phase2_shapes.yaml",
        "vqvae",
        "prepare",
        TRAIN + "phase1_shapes.yaml",
        "prepare",
        TRAIN + "phase3_shapes.yaml",
        "convert",
        "sample",
        "evaluate",
        "report",
    ]
    for command in (clone / "commands.txt").read_text().splitlines():
        assert f"$ {command}" in output, "a command must be shown as it can be repeated"
    assert f"mlflow ui --backend-store-uri sqlite:///{clone}/runs/mlflow.db" in output

    run(clone)
    assert [line.split()[1] for line in commands(clone)[len(done) :]] == ["report"]

    run(clone, "--fresh")
    assert commands(clone)[len(done) + 1 :] == done


def test_ctrl_c_saves_and_the_same_command_goes_on(clone: Path):
    demo = start(clone, STAND_IN_WAITS="1")
    deadline = time.monotonic() + 60
    while not (clone / "is_training").exists():
        assert demo.poll() is None, demo.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 75, output
    assert "The same command goes on from here: bash launch/demo.sh" in output
    run(clone)
    assert commands(clone)[0] == commands(clone)[1] == TRAIN + "phase2_shapes.yaml"


def test_an_unknown_word_is_refused(clone: Path):
    demo = start(clone, "--data", "cats")
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 2
    assert "--data cats: allowed are shapes and openmoji" in output


@pytest.mark.parametrize(
    ("script", "word"), [("demo", "--data"), ("demo", "--python"), ("test", "--python")]
)
def test_an_option_without_its_value_is_a_usage_error(script: str, word: str):
    done = subprocess.run(
        ["bash", ROOT / "launch" / f"{script}.sh", word],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(rf"^{script}\.sh: {word} needs .* after it$", done.stderr, re.MULTILINE)


def test_half_of_the_demo_prompts_were_never_seen_in_training():
    lines = (ROOT / "launch" / "prompts_shapes.txt").read_text().splitlines()
    prompts = [
        caption
        for source in (seen_prompts, held_out_prompts)
        for objects, count in ((1, 6), (2, 2))
        for caption, _ in source(count, objects=objects, seed=0)
    ]
    assert lines == prompts
