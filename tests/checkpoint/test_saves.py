"""Checkpoints under the real launcher on two ranks: whole or absent, and the next step the same."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from two_rank_saves import CASES

from lgpt.checkpoint.checks import recorded_check
from lgpt.checkpoint.folders import newest_checkpoint, verify
from lgpt.checkpoint.load import load_checkpoint
from lgpt.checkpoint.manifest import list_files, read_manifest
from lgpt.checkpoint.retention import Keep
from lgpt.checkpoint.rng import capture_rng_state, restore_rng_state
from lgpt.checkpoint.store import save_checkpoint
from lgpt.core.errors import CheckpointError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_takes_the_steps_that_would_have_come(saves, case):
    for result in saves.results:
        assert result[case]["resumed"] == result[case]["straight"]
        assert result[case]["ends_in_the_same_weights"]
        assert result[case]["state"] == {"step": 3, "note": "ä"}


def test_ranks_get_their_own_generators_back(saves):
    first, second = (result["zero2_fp32"]["resumed"] for result in saves.results)
    assert first != second


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_on_one_rank_raises_on_all_and_leaves_the_old_ones_whole(saves, case):
    for result in saves.results:
        assert "rank 1: " in result[case]["full_disk"]
        assert ".staging_step_4" in result[case]["full_disk"]
        # The ranks' collectives still match: the next save works.
        assert result[case]["after_full_disk"] == "step_5"
    assert verify(saves.step(case, 3), deep=True) == []
    assert not saves.step(case, 4).exists()


def test_a_save_killed_before_its_rename_is_not_chosen(saves):
    checkpoints = saves.folder / "zero2_bf16" / "checkpoints"
    left = checkpoints / ".staging_step_6"
    assert (left / "manifest.json").exists(), "the kill came too early to prove anything"
    assert not saves.step("zero2_bf16", 6).exists()
    assert newest_checkpoint(saves.folder / "zero2_bf16") == saves.step("zero2_bf16", 5)
    assert verify(saves.step("zero2_bf16", 5), deep=True) == []
    assert (checkpoints / "latest").read_text() == "step_5\n"


def test_only_the_last_ones_are_kept(saves):
    checkpoints = saves.folder / "zero3_fp32" / "checkpoints"
    names = ["checks.json", "latest", "step_3", "step_5"]
    assert sorted(path.name for path in checkpoints.iterdir()) == names


def test_a_manifest_names_every_file_and_who_wrote_it(saves):
    folder = saves.step("zero3_bf16", 3)
    manifest = read_manifest(folder)
    assert sorted(manifest.files) == list_files(folder)
    assert "zero_to_fp32.py" not in manifest.files
    assert {"trainer_state.json", "config.yaml", "rng/rank_00001.pt"} <= set(manifest.files)
    assert str(manifest.engines["model"]) == "ZeRO-3 in bf16"
    assert (manifest.step, manifest.world_size) == (3, 2)


def test_another_precision_is_refused_with_both(saves):
    for result in saves.results:
        assert "ZeRO-2 in bf16" in result["other_precision"]
        assert "ZeRO-2 in fp32" in result["other_precision"]
    with pytest.raises(CheckpointError, match=r"holds model \(ZeRO-2 in fp32\), this run has :"):
        load_checkpoint({}, saves.step("zero2_fp32", 3))


def test_a_flipped_bit_is_found_before_anything_is_loaded(saves):
    damaged = saves.step("zero3_bf16", 5)
    for result in saves.results:
        assert result["damaged"] == str(saves.step("zero3_bf16", 3))
    check = recorded_check(damaged)
    assert check is not None
    assert "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt has other content" in check.problems[0]
    assert verify(damaged, deep=False) == []
    assert "sha256" in verify(damaged, deep=True)[0]


def copy_of(saves, tmp_path: Path) -> Path:
    run_folder = tmp_path / "run"
    source = saves.folder / "zero2_fp32" / "checkpoints"
    shutil.copytree(source, run_folder / "checkpoints")
    return run_folder


def damage_no_manifest(newest: Path) -> str:
    (newest / "manifest.json").unlink()
    return "never completed"


def damage_half_manifest(newest: Path) -> str:
    manifest = newest / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    return "is damaged"


def damage_short_file(newest: Path) -> str:
    shard = next((newest / "model").glob("*rank_1*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    return "bytes instead of"


def damage_missing_file(newest: Path) -> str:
    (newest / "rng" / "rank_00001.pt").unlink()
    return "rng/rank_00001.pt is missing"


def damage_other_format(newest: Path) -> str:
    manifest = newest / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 9'))
    return "has format 9, this version reads up to 2"


@pytest.mark.parametrize(
    "damage",
    [
        damage_no_manifest,
        damage_half_manifest,
        damage_short_file,
        damage_missing_file,
        damage_other_format,
    ],
)
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_chosen(
    saves, tmp_path, caplog, damage
):
    run_folder = copy_of(saves, tmp_path)
    newest = newest_checkpoint(run_folder)
    assert newest is not None
    assert newest.name == "step_5"
    reason = damage(newest)
    chosen = newest_checkpoint(run_folder)
    assert chosen is not None
    assert chosen.name == "step_3"
    assert reason in caplog.text
    assert "step_5 is skipped" in caplog.text


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert newest_checkpoint(tmp_path) is None


def test_an_old_checkpoint_that_cannot_be_removed_is_told_and_stops_no_save(
    tmp_path, caplog, monkeypatch
):
    checkpoints = tmp_path / "checkpoints"
    for name in (".pruned_step_1", ".staging_step_2", ".staging_step_9"):
        (checkpoints / name / "rng").mkdir(parents=True)
    remove = shutil.rmtree

    def resist(folder: Path, **options: bool) -> None:
        if folder.name == ".pruned_step_1":
            raise OSError(39, "Directory not empty", f"{folder}/.nfs000123")
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", resist)
    saved = save_checkpoint({}, tmp_path, 2, trainer_state={}, keep=Keep(2), extra_files={})
    assert verify(saved, deep=True) == []
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == [".pruned_step_1", "checks.json", "latest", "step_2"]
    assert ".nfs000123" in caplog.text


def test_generators_go_on_where_they_were_captured():
    random.gauss(0, 1)  # leaves half a pair behind in Python's generator ...
    np.random.normal()  # ... and in numpy's
    state = capture_rng_state()

    def draw() -> tuple[object, ...]:
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.normal(),
            np.random.randint(1000),
            torch.rand(3).tolist(),
        )

    first = draw()
    assert draw() != first
    restore_rng_state(state)
    assert draw() == first
