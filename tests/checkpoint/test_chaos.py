"""Runs that are killed again and again lose no checkpoint and end where they would have ended.

8 rounds in the suite; LGPT_REQUIRE_CHAOS_ROUNDS=60 asks for more.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_runs
from forked_ranks import ForkedRanks, Kill, Outcome
from test_resume import steps_of

from lgpt.checkpoint.folders import newest_checkpoint, step_folders, step_of, verify
from lgpt.core.files import sha256_of_file

ROUNDS = int(os.environ.get("LGPT_REQUIRE_CHAOS_ROUNDS", "8"))
CASES = (("vqvae", "zero2_bf16", "fp32"), ("transformer", "zero3_bf16", "bf16"))
# Where kills aim; the first ones so that eight rounds have each of them once.
AIMS = ("publish", "validate", "step", "prune", "stage", "draw", "complete", "load")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


def whole_steps(run_folder: Path) -> list[int]:
    """Steps of all checkpoints, newest first; each is complete or it is not there."""
    folders = step_folders(run_folder / "checkpoints")
    assert {folder.name: verify(folder, deep=True) for folder in folders} == {
        folder.name: [] for folder in folders
    }
    return [step_of(folder) for folder in folders]


def resumed_from(outcome: Outcome) -> int:
    found = [line for line in outcome.log.splitlines() if "Going on from " in line]
    return int(found[0].partition("step_")[2].split()[0]) if found else 0


@pytest.mark.parametrize(("trains", "deepspeed", "precision"), CASES)
def test_a_run_killed_at_random_instants_ends_like_one_that_was_not(
    ranks, folder, trains, deepspeed, precision
):
    rounds = ROUNDS // len(CASES)
    chance = random.Random(f"{deepspeed} {ROUNDS}")
    changes = {
        "deepspeed": deepspeed,
        "checkpoint": {
            "every_steps": 1,
            "keep_last": 2,
            "asynchronous": trains == "transformer",
        },
        "training": {
            "max_steps": 4 * rounds + 4,
            "precision": precision,
            "validate_every": 2,
            "sample_every": 2,
        },
    }
    if trains == "vqvae":
        changes["vqvae"] = tiny_runs.FEW_MODULES
    assert ranks.train(
        tiny_runs.write_run(folder, f"straight-{trains}", trains, **changes)
    ).codes == [0, 0]
    config = tiny_runs.write_run(folder, f"killed-{trains}", trains, **changes)
    run_folder = folder / "runs" / f"killed-{trains}"
    before: list[int] = []
    for number in range(rounds):
        place = AIMS[(number + rounds * (trains == "transformer")) % len(AIMS)]
        if place == "load" and not before:
            place = "step"
        kill = Kill(place, 1 if place == "load" else chance.randint(1, 2), 0.03 * chance.random())
        outcome = ranks.train(config, kill=kill)
        assert outcome.codes == [-signal.SIGKILL, -signal.SIGKILL], f"{kill}: {outcome.log[-2000:]}"
        assert resumed_from(outcome) == (before[0] if before else 0), kill
        after = whole_steps(run_folder)
        assert after[:1] >= before[:1], f"{kill} lost a checkpoint: {before} -> {after}"
        assert len(after) >= min(2, len(before)), f"{kill}: {before} -> {after}"
        before = after
    # And once one rank alone: the other cannot go on without it.
    lonely = ranks.train(config, kill=Kill("step", 2, 0.0, ranks=(1,)))
    assert lonely.codes[1] == -signal.SIGKILL
    assert lonely.codes[0] == 4, lonely.log[-3000:]
    assert "Another rank has died" in lonely.log
    outcome = ranks.train(config)
    assert outcome.codes == [0, 0], outcome.log[-3000:]
    straight = folder / "runs" / f"straight-{trains}"
    assert steps_of(run_folder) == steps_of(straight)
    names = {path.name for path in (run_folder / "checkpoints").iterdir()}
    last = changes["training"]["max_steps"]
    assert names == {"latest", "checks.json", f"step_{last}", f"step_{last - 1}"}


@pytest.fixture(scope="module")
def begun(ranks: ForkedRanks, folder: Path) -> Path:
    """A run of five steps with a checkpoint of each."""
    config = tiny_runs.write_run(
        folder,
        "begun",
        "vqvae",
        training={"max_steps": 5},
        checkpoint={"every_steps": 1, "keep_every": 1},
    )
    assert ranks.train(config).codes == [0, 0]
    run_folder = folder / "runs" / "begun"
    (run_folder / "DONE").unlink()
    shutil.rmtree(run_folder / "model")
    return config


def copy_of(begun: Path, name: str) -> tuple[Path, Path]:
    """Another run that stands where `begun` stands."""
    runs = begun.parent / "runs"
    shutil.copytree(runs / "begun", runs / name)
    config = begun.with_name(f"{name}.yaml")
    config.write_text(begun.read_text().replace("name: begun", f"name: {name}"))
    return config, runs / name / "checkpoints"


def test_four_kinds_of_damage_are_each_told_and_the_fifth_checkpoint_is_taken(ranks, begun):
    config, checkpoints = copy_of(begun, "damaged")
    shard = next(
        path.relative_to(checkpoints / "step_5").as_posix()
        for path in (checkpoints / "step_5" / "model").glob("*rank_1*optim_states.pt")
    )
    cut = checkpoints / "step_5" / shard
    cut.write_bytes(cut.read_bytes()[:-100])
    content = bytearray((checkpoints / "step_4" / shard).read_bytes())
    content[len(content) // 2] ^= 8
    (checkpoints / "step_4" / shard).write_bytes(content)
    (checkpoints / "step_3" / shard).unlink()
    shutil.copy(checkpoints / "step_1" / "manifest.json", checkpoints / "step_2")
    outcome = ranks.train(config, "training.max_steps=6")
    assert outcome.codes == [0, 0], outcome.log[-3000:]
    for step, reason in (
        (5, f"{shard} has "),
        (4, f"{shard} has other content than was saved (sha256 differs)"),
        (3, f"{shard} is missing"),
        (2, "its manifest is the one of step 1"),
    ):
        assert f"step_{step} is skipped: {reason}" in outcome.log
    assert resumed_from(outcome) == 1


def test_a_full_disk_ends_the_run_or_not_as_the_config_says(ranks, begun):
    """No file may grow beyond 200,000 bytes: shards are larger, all others smaller."""
    config, checkpoints = copy_of(begun, "full")
    words = ("training.max_steps=9", "checkpoint.keep_every=0")
    stopped = ranks.train(config, *words, max_file_bytes=200_000)
    assert stopped.codes == [3, 3], stopped.log[-3000:]
    assert "could not write" in stopped.log
    assert whole_steps(checkpoints.parent) == [5, 4, 3, 2, 1]
    went_on = ranks.train(
        config, *words, "checkpoint.on_failed_save=continue", max_file_bytes=200_000
    )
    # The last save has no next one that could make up for it.
    assert went_on.codes == [3, 3], went_on.log[-3000:]
    assert went_on.log.count("Training goes on (checkpoint.on_failed_save: continue)") == 3
    assert "step 9/9" in went_on.log
    assert whole_steps(checkpoints.parent) == [5, 4, 3, 2, 1]
    assert ranks.train(config, *words).codes == [0, 0]
    assert whole_steps(checkpoints.parent) == [9, 8]


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A file system in memory of so many bytes, with what lies at `place` in it."""
    aside = place.with_name(f"{place.name}-aside")
    place.rename(aside)
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
    mounted = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"this user may mount nothing: {mounted.stderr.strip()}")
    try:
        shutil.copytree(aside, place, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full_keeps_every_old_checkpoint(ranks, begun):
    config, checkpoints = copy_of(begun, "really-full")
    used = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
    words = ("training.max_steps=7", "checkpoint.keep_every=0")
    with small_disk(checkpoints, used + used // 10):  # half of one more checkpoint
        stopped = ranks.train(config, *words)
        assert stopped.codes == [3, 3], stopped.log[-3000:]
        free = re.search(r"\(free on its disk: ([\d,]+) bytes\)", stopped.log)
        assert free is not None, stopped.log[-3000:]
        assert int(free[1].replace(",", "")) < used // 10
        assert whole_steps(checkpoints.parent) == [5, 4, 3, 2, 1]
        subprocess.run(["mount", "-o", f"remount,size={3 * used}", str(checkpoints)], check=True)
        went_on = ranks.train(config, *words)
        assert went_on.codes == [0, 0], went_on.log[-3000:]
        assert resumed_from(went_on) == 5
        assert whole_steps(checkpoints.parent) == [7, 6]


def test_a_conversion_that_is_killed_leaves_the_old_export_or_the_new_one(ranks, begun):
    """Whole, and under its name after the next start at the latest."""
    config, checkpoints = copy_of(begun, "converted")
    out = config.parent / "exported"
    words = ("convert", str(checkpoints / "step_3"), str(out), "--max-shard-size", "100KB")
    assert ranks.command(*words).codes == [0]
    newer = ("convert", str(checkpoints / "step_5"), *words[2:], "--overwrite")
    assert exported_step(out) == 3
    chance = random.Random(7)
    for number in range(max(6, ROUNDS // 4)):
        place = ("convert", "describe", "replace")[number % 3]
        kill = Kill(place, 1, (0.02 if place == "convert" else 0.001) * chance.random(), (0,))
        outcome = ranks.command(*newer, kill=kill)
        if outcome.codes == [0]:  # it was faster than the kill
            assert exported_step(out) == 5
            continue
        assert outcome.codes == [-signal.SIGKILL], outcome.log[-2000:]
        there = out if out.exists() else out.with_name(".exported.replaced")
        assert exported_step(there) in (3, 5), kill
    assert ranks.command(*newer).codes == [0]
    assert exported_step(out) == 5
    beside = {path.name for path in out.parent.iterdir() if "exported" in path.name}
    assert beside == {"exported"}


def exported_step(folder: Path) -> int:
    """The step of an export whose every file has the digest that it should have."""
    told = json.loads((folder / "export.json").read_text())
    for name, digest in told["sha256"].items():
        assert sha256_of_file(folder / name) == digest, name
    assert {"model.safetensors.index.json", "config.json"} < set(told["sha256"])
    return int(told["step"])


def test_an_export_that_a_kill_left_aside_is_put_back_even_when_the_next_start_fails(ranks, begun):
    config, checkpoints = copy_of(begun, "aside")
    out = config.parent / "put-back"
    words = ("convert", str(checkpoints / "step_3"), str(out))
    assert ranks.command(*words).codes == [0]
    out.rename(out.with_name(".put-back.replaced"))  # where the kill between the renames leaves it
    shutil.rmtree(checkpoints / "step_3" / "model")
    assert ranks.command(*words, "--overwrite").codes == [3]
    assert exported_step(out) == 3


def test_a_folder_that_cannot_be_written_is_a_sentence(ranks, begun):
    config, checkpoints = copy_of(begun, "read-only")
    shutil.rmtree(checkpoints)
    checkpoints.symlink_to("/proc/sys/kernel")  # refuses also root
    outcome = ranks.train(config)
    assert outcome.codes == [3, 3], outcome.log[-3000:]
    assert "could not prepare" in outcome.log
    assert newest_checkpoint(checkpoints.parent) is None
