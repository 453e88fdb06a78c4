"""Which checkpoints stay: the rules against a brute-force reading of their own words."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import pytest
from typer.testing import CliRunner

from lgpt.checkpoint.checks import record_check, recorded_check
from lgpt.checkpoint.folders import newest_checkpoint, verify
from lgpt.checkpoint.load import find_whole_checkpoint
from lgpt.checkpoint.manifest import Manifest, list_files, record_files
from lgpt.checkpoint.retention import Keep, Kept, prune, reasons_to_stay, survey
from lgpt.checkpoint.sources import find_checkpoint
from lgpt.cli import app
from lgpt.core.errors import CheckpointError
from lgpt.core.files import sha256_of_file


def make(run_folder: Path, step: int, loss: Optional[float] = None) -> Path:
    """A whole checkpoint of one small file."""
    folder = run_folder / "checkpoints" / f"step_{step}"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "shard.pt").write_bytes(bytes(range(200)) * step)
    facts = {} if loss is None else {"validation": {"name": "val_ce_loss", "loss": loss}}
    Manifest(step, 2, {}, record_files(folder, list_files(folder)), {}, facts).write(folder)
    return folder


def flip_a_bit(folder: Path) -> None:
    shard = folder / "model" / "shard.pt"
    content = bytearray(shard.read_bytes())
    content[7] ^= 4
    shard.write_bytes(content)


def steps_in(run_folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run_folder / "checkpoints").glob("step_*"))


def test_every_rule_keeps_what_it_says_and_nothing_else_stays():
    """All 4^4 states of the four oldest of six checkpoints, against the rules said in loops."""
    keep = Keep(last=2, every_steps=30, best=1)
    for states in itertools.product(("whole", "read", "damaged", "best"), repeat=4):
        found = [Kept(Path("step_60")), Kept(Path("step_50"))]
        for step, state in zip((40, 30, 20, 10), states):
            found.append(
                Kept(
                    Path(f"step_{step}"),
                    ("x is missing",) if state == "damaged" else (),
                    was_read=state == "read",
                    validation_loss=float(step) if state == "best" else None,
                )
            )
        expected = {60, 50}
        by_step = {each.step: each for each in found}
        if states[1] != "damaged":
            expected.add(30)
        best = [step for step in (10, 20, 30, 40) if by_step[step].validation_loss is not None]
        expected |= set(best[:1])  # the loss grows with the step
        read = [step for step in (40, 30, 20, 10) if by_step[step].was_read]
        expected |= set(read[:1])
        assert set(reasons_to_stay(found, keep)) == expected, states


def test_nothing_goes_before_two_whole_ones_are_there():
    found = [
        Kept(Path("step_9"), ("short",)),
        Kept(Path("step_8")),
        Kept(Path("step_7"), ("short",)),
    ]
    assert set(reasons_to_stay(found, Keep(2))) == {9, 8, 7}


def test_the_last_verified_one_stays_when_newer_ones_turn_out_damaged(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    checkpoints = tmp_path / "checkpoints"
    record_check(checkpoints / "step_1", [])
    flip_a_bit(checkpoints / "step_3")
    flip_a_bit(checkpoints / "step_4")
    # Before anybody reads them, 3 and 4 look whole: 1 is the only one known to be good.
    assert [path.name for path in prune(checkpoints, Keep(2))] == ["step_2"]
    assert steps_in(tmp_path) == [1, 3, 4]
    for step in (3, 4):
        record_check(checkpoints / f"step_{step}", verify(checkpoints / f"step_{step}", deep=True))
    make(tmp_path, 5)
    # Only 1 and 5 count as whole now; nothing may go.
    assert prune(checkpoints, Keep(2)) == []
    make(tmp_path, 6)
    assert [path.name for path in prune(checkpoints, Keep(2))] == ["step_4", "step_3"]
    assert steps_in(tmp_path) == [1, 5, 6]
    record_check(checkpoints / "step_6", [])
    assert [path.name for path in prune(checkpoints, Keep(2))] == ["step_1"]


def test_a_check_of_another_save_of_the_same_step_does_not_count(tmp_path):
    folder = make(tmp_path, 3)
    record_check(folder, ["model/shard.pt is missing"])
    assert newest_checkpoint(tmp_path) is None
    (folder / "model" / "shard.pt").write_bytes(b"saved again")
    Manifest(3, 2, {}, record_files(folder, list_files(folder)), {}).write(folder)
    assert recorded_check(folder) is None
    assert newest_checkpoint(tmp_path) == folder


def test_an_unreadable_memory_of_checks_is_no_memory(tmp_path):
    folder = make(tmp_path, 3)
    for text in ("{", "[]", '{"step_3": {"read_at": "x"}}'):
        (tmp_path / "checkpoints" / "checks.json").write_text(text)
        assert recorded_check(folder) is None
        assert not survey(tmp_path / "checkpoints")[0].problems


def test_a_manifest_from_another_step_makes_a_checkpoint_unusable(tmp_path):
    old, new = make(tmp_path, 3), make(tmp_path, 4)
    (new / "manifest.json").write_bytes((old / "manifest.json").read_bytes())
    assert verify(new, deep=False) == ["its manifest is the one of step 3"]
    assert newest_checkpoint(tmp_path) == old


def _no_folder(manifest: Path) -> None:
    shutil.rmtree(manifest.parent)
    manifest.parent.write_text("a file")


def _folder_in_its_place(manifest: Path) -> None:
    manifest.unlink()
    manifest.mkdir()


def _with(**changes: object) -> Callable[[Path], None]:
    def edit(manifest: Path) -> None:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (_no_folder, "has no manifest.json"),
        (_folder_in_its_place, "manifest.json cannot be read (Is a directory)"),
        (_with(step="60"), "step is '60'"),
        (_with(world_size="two"), "world_size is 'two'"),
        (_with(created_at="today"), "created_at is 'today'"),
        (_with(facts=None), "facts is None"),
        (_with(facts={"validation": 3}), "not subscriptable"),
        (_with(facts={"validation": {"loss": None}}), "not 'NoneType'"),
    ],
)
def test_a_manifest_edited_by_hand_is_told_and_the_one_before_it_chosen(run_folder, edit, told):
    make(run_folder, 70)
    edit(run_folder / "checkpoints" / "step_70" / "manifest.json")
    (run_folder / "checkpoints" / "latest").write_bytes(b"\xff\xfe")
    choice = lgpt("checkpoint", "why", run_folder, "--json")
    assert choice["chosen"] == "step_40"
    assert told in choice["passed_over"][0]["problems"][0]
    listed = lgpt("checkpoint", "ls", run_folder, "--json")
    assert told in listed["checkpoints"][0]["problems"][0]
    assert "step_70" in lgpt("checkpoint", "prune", run_folder, "--json")["stays"]
    assert find_whole_checkpoint(run_folder) == run_folder / "checkpoints" / "step_40"


@pytest.mark.parametrize("name", ["backup", ".diverged_step_3", "."])
def test_a_copy_of_a_checkpoint_is_one_whatever_its_name(tmp_path, monkeypatch, name):
    original = make(tmp_path / "mine", 3)
    folder = original
    if name == ".":
        monkeypatch.chdir(original)
    else:
        folder = Path(shutil.copytree(original, tmp_path / name))
        flip_a_bit(original)
    place = find_checkpoint(Path(".") if name == "." else folder)
    assert place.step_folder.samefile(folder)
    assert place.name == folder.name
    assert verify(place.step_folder, deep=True) == []
    (result,) = lgpt("checkpoint", "verify", name if name == "." else folder, "--json")[
        "checkpoints"
    ]
    assert result["is_whole"]
    # Only a run's own folder is a memory of what was read.
    assert [path.parent for path in tmp_path.rglob("checks.json")] == (
        [original.parent] if name == "." else []
    )


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    folder = make(tmp_path, 3)
    folder.rename(folder.with_name(".replaced_step_3"))
    prune(tmp_path / "checkpoints", Keep(2))
    assert newest_checkpoint(tmp_path) == folder
    assert verify(folder, deep=True) == []


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path):
    checkpoints = make(tmp_path, 3).parent
    (checkpoints / ".staging_step_4").mkdir()
    (checkpoints / ".latest.4711.tmp").write_text("step_4")
    prune(checkpoints, Keep(2))
    assert [path.name for path in checkpoints.iterdir()] == ["step_3"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Six checkpoints: the newest without a manifest, the one before it with a flipped bit."""
    folder = tmp_path / "runs" / "mine"
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, None), (60, None)):
        make(folder, step, loss)
    (folder / "checkpoints" / "step_60" / "manifest.json").unlink()
    flip_a_bit(folder / "checkpoints" / "step_50")
    (folder / "config.yaml").write_text(
        "phase: 2\nname: mine\ntraining: {max_steps: 100}\nschedule: {warmup_steps: 1}\n"
        "checkpoint: {every_steps: 10, keep_last: 2, keep_best: 1}\n"
    )
    return folder


def lgpt(*words: object) -> dict[str, object]:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    answer: dict[str, object] = json.loads(done.output.splitlines()[-1])
    return {**answer, "text": done.output}


def test_why_names_the_reason_of_every_newer_one(run_folder):
    quick = lgpt("checkpoint", "why", run_folder, "--quick", "--json")
    assert quick["chosen"] == "step_50"
    read = lgpt("checkpoint", "why", run_folder, "--json")
    assert read["chosen"] == "step_40"
    assert "A start would go on from step_40 (every byte read)" in read["text"]
    assert "Not from step_60: " in read["text"]
    assert "never completed" in read["text"]
    assert "Not from step_50: model/shard.pt has other content than was saved" in read["text"]
    (run_folder / "DONE").touch()
    of_checkpoints = lgpt("checkpoint", "why", run_folder / "checkpoints", "--json")
    assert (of_checkpoints["chosen"], of_checkpoints["is_done"]) == ("step_40", True)
    # What a read found is not forgotten.
    assert lgpt("checkpoint", "why", run_folder, "--quick", "--json")["chosen"] == "step_40"


def test_why_promises_no_new_beginning_of_a_run_that_is_done(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    text = lgpt("checkpoint", "why", tmp_path, "--json")["text"]
    assert "A start would begin at step 0: there is no checkpoint." in text
    (tmp_path / "DONE").touch()
    text = lgpt("checkpoint", "why", tmp_path, "--json")["text"]
    assert "There is no checkpoint that it could go on from." in text
    assert "begin at step 0" not in text


def test_verify_reads_all_and_fails_when_one_is_damaged(run_folder):
    with pytest.raises(CheckpointError, match="2 of 6 checkpoints are damaged"):
        lgpt("checkpoint", "verify", run_folder, "--json")
    whole = lgpt("checkpoint", "verify", run_folder / "checkpoints" / "step_40", "--json")
    (result,) = whole["checkpoints"]
    assert result["is_whole"]
    assert result["bytes"] > 200 * 40


def test_ls_tells_size_loss_state_and_why_each_one_stays(run_folder):
    listed = lgpt("checkpoint", "ls", run_folder, "--json")
    by_name = {each["name"]: each for each in listed["checkpoints"]}
    assert list(by_name) == [f"step_{step}" for step in (60, 50, 40, 30, 20, 10)]
    assert by_name["step_60"]["problems"]
    assert by_name["step_20"]["stays_because"] == ["one of the best 1"]
    assert by_name["step_10"]["stays_because"] == []
    assert by_name["step_10"]["validation_loss"] == 3.0


def test_prune_says_first_then_does_and_leaves_a_running_save_alone(run_folder):
    staged = run_folder / "checkpoints" / ".staging_step_70"
    staged.mkdir()
    said = lgpt("checkpoint", "prune", run_folder, "--dry-run", "--json")
    assert steps_in(run_folder) == [10, 20, 30, 40, 50, 60]
    done = lgpt("checkpoint", "prune", run_folder, "--json")
    assert said["removed"] == done["removed"] == ["step_30", "step_10"]
    assert steps_in(run_folder) == [20, 40, 50, 60]
    assert staged.exists()


def test_a_folder_without_checkpoints_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoints: give a run folder"):
        lgpt("checkpoint", "why", tmp_path)


def test_a_run_whose_every_checkpoint_is_damaged_is_not_begun_anew(tmp_path):
    assert find_whole_checkpoint(tmp_path) is None, "nothing was completed yet"
    flip_a_bit(make(tmp_path, 3))
    (make(tmp_path, 6) / "model" / "shard.pt").unlink()
    with pytest.raises(CheckpointError, match=r"None of the 2 checkpoints .*another name="):
        find_whole_checkpoint(tmp_path)
    assert "refuse to begin anew" in lgpt("checkpoint", "why", tmp_path, "--json")["text"]
    assert find_whole_checkpoint(make(tmp_path, 9).parents[1]) is not None


def test_a_disk_that_does_not_answer_is_not_kept_as_damage(tmp_path, monkeypatch):
    older, newer = make(tmp_path, 3), make(tmp_path, 6)

    def away(path: Path) -> str:
        if newer in path.parents and path.suffix == ".pt":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return sha256_of_file(path)

    with monkeypatch.context() as patch:
        patch.setattr("lgpt.checkpoint.manifest.sha256_of_file", away)
        assert find_whole_checkpoint(tmp_path) == older
    assert recorded_check(newer) is None
    assert find_whole_checkpoint(tmp_path) == newer
