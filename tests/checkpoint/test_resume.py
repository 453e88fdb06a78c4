"""Runs that go on: the steps that would have come, and the numbers that were chosen."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

import lgpt
from lgpt.checkpoint.average_files import average_file, has_average, read_average
from lgpt.checkpoint.deepspeed_files import read_safely
from lgpt.checkpoint.manifest import read_manifest
from lgpt.checkpoint.resume_diff import facts_rows, settings_rows, settled, table_of
from lgpt.core.files import sha256_of_file
from lgpt.settings.run import load_run_settings

DS_CONFIGS = Path(lgpt.__file__).parents[1] / "ds_configs"
pytestmark = pytest.mark.slow


def steps_of(run_folder: Path) -> list[dict[str, float]]:
    """What every step computed, without what the clock or the machine decides."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    by_clock = ("second", "gib", "time")
    return [
        {name: v for name, v in line.items() if not any(word in name for word in by_clock)}
        for line in lines
    ]


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for each in value for t in tensors_in(each)] if isinstance(value, list) else []


def masters_in(shard: Mapping[str, Any]) -> list[torch.Tensor]:
    state = shard["optimizer_state_dict"]
    names = ("single_partition_of_fp32_groups", "fp32_flat_groups")
    return list(next(state[name] for name in names if name in state))


def begin_at_step_4(straight: Path, name: str) -> Path:
    """The folder of another run that stands where `straight` stood after 4 steps."""
    other = straight.with_name(name)
    shutil.copytree(straight / "checkpoints" / "step_4", other / "checkpoints" / "step_4")
    return other


def assert_same_shards(straight: Path, other: Path, step: str) -> None:
    """Masters, moments and step counts of every engine and rank, bit for bit."""
    shards = list((straight / "checkpoints" / step).glob("*/*optim*"))
    assert len(shards) >= 2
    for shard in shards:
        twin = other / shard.relative_to(straight)
        ours, theirs = tensors_in(read_safely(shard)), tensors_in(read_safely(twin))
        assert len(ours) >= 8  # masters, two moments and steps of two groups
        assert all(map(torch.equal, ours, theirs))


CASES = [
    ("vqvae", "zero2_bf16", "bf16"),
    ("vqvae", "zero3_bf16", "fp32"),
    ("transformer", "zero2_bf16", "fp32"),
    ("transformer", "zero3_bf16", "bf16"),
]
if os.environ.get("LGPT_REQUIRE_ALL_RESUMES"):  # the other four, for some minutes more
    _ALL = itertools.product(
        ("vqvae", "transformer"), ("zero2_bf16", "zero3_bf16"), ("bf16", "fp32")
    )
    CASES += [case for case in _ALL if case not in CASES]


@pytest.mark.parametrize(("trains", "deepspeed", "precision"), CASES)
def test_the_next_fifty_steps_are_those_of_a_run_that_was_never_interrupted(
    ranks, folder, trains, deepspeed, precision
):
    name = f"{trains}-{deepspeed}-{precision}"
    changes = {
        "deepspeed": deepspeed,
        "training": {
            "max_steps": 54,
            "precision": precision,
            "validate_every": 20,
            "ema_decay": 0.9,
        },
        "checkpoint": {"every_steps": 4, "keep_every": 4},
    }
    if trains == "vqvae":
        changes["vqvae"] = tiny_runs.FEW_MODULES
    straight = folder / "runs" / name
    assert ranks.train(tiny_runs.write_run(folder, name, trains, **changes)).codes == [0, 0]
    resumed = begin_at_step_4(straight, f"{name}-resumed")
    shutil.copy(straight / "metrics.jsonl", resumed)
    outcome = ranks.train(tiny_runs.write_run(folder, resumed.name, trains, **changes))
    assert outcome.codes == [0, 0], outcome.log[-3000:]
    assert f"Going on from {resumed}/checkpoints/step_4" in outcome.log
    expected, got = steps_of(straight), steps_of(resumed)
    assert len({line.get("ce_loss", line.get("recon_loss")) for line in got}) > 50
    assert got == expected
    assert_same_shards(straight, resumed, "step_54")
    for rank, updates in ((0, 54), (1, 54)):
        average, its = (
            read_average(end / "checkpoints" / "step_54" / "model", rank)
            for end in (straight, resumed)
        )
        assert average.updates == its.updates == updates
        assert all(map(torch.equal, average.vectors, its.vectors))
        shard = next(
            (straight / "checkpoints" / "step_54" / "model").glob(f"*pp_rank_{rank}_*optim*")
        )
        masters = masters_in(read_safely(shard))
        assert [each.shape for each in masters] == [each.shape for each in average.vectors]
        assert not any(map(torch.equal, masters, average.vectors))
    place = read_manifest(resumed / "checkpoints" / "step_54").facts["place"]
    assert (place["next_image"], place["epoch"], place["next_image_of_epoch"]) == (432, 21, 12)


def test_a_run_that_is_stopped_early_exports_its_best_step(ranks, folder):
    config = tiny_runs.write_run(
        folder,
        "early",
        "vqvae",
        training={"max_steps": 20, "validate_every": 1, "early_stopping": 2},
        schedule={"warmup_steps": 0, "decay": "constant"},
        optimizer={"learning_rate": 0.2},  # far too much: validation soon rises
        checkpoint={"every_steps": 1, "keep_best": 1},
    )
    outcome = ranks.train(config)
    assert outcome.codes == [0, 0], outcome.log[-3000:]
    run_folder = folder / "runs" / "early"
    losses = {
        line["step"]: line["val_recon_loss"]
        for line in steps_of(run_folder)
        if "val_recon_loss" in line
    }
    best = min(losses, key=lambda step: (losses[step], step))
    done = json.loads((run_folder / "DONE").read_text())
    assert done["step"] == best + 2 < 20
    assert done["best_step"] == best
    assert json.loads((run_folder / "model" / "export.json").read_text())["step"] == best


@pytest.mark.parametrize("sums", ["fp32", "bf16"])  # BF16_Optimizer, and ZeRO's own
@pytest.mark.parametrize("trains", ["vqvae", "transformer"])
def test_stage_1_in_bf16_goes_on_bit_for_bit(ranks, folder, trains, sums):
    """And on one rank at stage 2, whose masters are checked as they are loaded."""
    stage_1 = json.loads((DS_CONFIGS / "zero2_bf16.json").read_text())
    stage_1["zero_optimization"]["stage"] = 1
    stage_1["data_types"]["grad_accum_dtype"] = sums
    (folder / f"zero1_{sums}.json").write_text(json.dumps(stage_1))
    changes: dict[str, Any] = {
        "deepspeed": str(folder / f"zero1_{sums}.json"),
        "training": {"max_steps": 6, "precision": "bf16", "ema_decay": 0.9},
        "checkpoint": {"every_steps": 2, "keep_every": 2},
    }
    if trains == "vqvae":
        changes["loss"] = {"adversarial": "hinge"}
        changes["discriminator"] = {"layers": 1, "channels": 16, "start_step": 2, "warmup_steps": 1}
    name = f"stage-1-{trains}-{sums}"
    straight = folder / "runs" / name
    outcome = ranks.train(tiny_runs.write_run(folder, name, trains, **changes))
    assert outcome.codes == [0, 0], outcome.log[-3000:]

    resumed = begin_at_step_4(straight, f"{name}-resumed")
    outcome = ranks.train(tiny_runs.write_run(folder, resumed.name, trains, **changes))
    assert outcome.codes == [0, 0], outcome.log[-3000:]
    assert_same_shards(straight, resumed, "step_6")
    if trains == "vqvae":
        end, again = (run / "model" / "model.safetensors" for run in (straight, resumed))
        assert sha256_of_file(end) == sha256_of_file(again)

    elastic = begin_at_step_4(straight, f"{name}-elastic")
    changes["deepspeed"] = "zero2_bf16"
    config = tiny_runs.write_run(folder, elastic.name, trains, **changes)
    outcome = ranks.train(config, "batch.micro_batch_images=2", ranks=1)
    assert outcome.codes == [0], outcome.log[-3000:]
    loss = "recon_loss" if trains == "vqvae" else "ce_loss"
    wanted, got = (
        [line[loss] for line in steps_of(run) if loss in line][-2:] for run in (straight, elastic)
    )
    assert got == pytest.approx(wanted, rel=0.02)  # what the ranks send is rounded to bf16


def test_a_run_that_took_all_its_steps_goes_on_when_more_are_asked_for(ranks, folder):
    """To the weights of one that was asked for all of them at once: its rate does not decay."""
    changes = {
        "schedule": {"warmup_steps": 0, "decay": "constant"},
        "training": {"max_steps": 4, "validate_every": 2},
    }
    runs = folder / "runs"
    config = tiny_runs.write_run(folder, "extended", "vqvae", **changes)
    assert ranks.train(config).codes == [0, 0]
    first = sha256_of_file(runs / "extended" / "model" / "model.safetensors")
    outcome = ranks.train(config)
    assert outcome.codes == [0, 0]
    assert "is done after 4 steps" in outcome.log
    assert "nothing to train" in outcome.log
    outcome = ranks.train(config, "training.max_steps=6")
    assert outcome.codes == [0, 0], outcome.log[-3000:]
    assert "was done after 4 steps and goes on to training.max_steps = 6" in outcome.log
    assert f"Going on from {runs / 'extended'}/checkpoints/step_4" in outcome.log
    done = json.loads((runs / "extended" / "DONE").read_text())
    assert (done["step"], done["max_steps"]) == (6, 6)
    changes["training"]["max_steps"] = 6
    straight = tiny_runs.write_run(folder, "at-once", "vqvae", **changes)
    assert ranks.train(straight).codes == [0, 0]
    end, wanted = (
        sha256_of_file(runs / name / "model" / "model.safetensors")
        for name in ("extended", "at-once")
    )
    assert end == wanted != first


@pytest.mark.parametrize("deepspeed", ["zero2_bf16", "zero3_bf16"])
def test_the_chosen_numbers_hold_whatever_deepspeed_puts_back(ranks, folder, deepspeed):
    """DeepSpeed alone gives back the file's weight decay, betas and (ZeRO-2) clipping."""
    name = f"numbers-{deepspeed}"
    config = tiny_runs.write_run(
        folder,
        name,
        "vqvae",
        deepspeed=deepspeed,
        training={"max_steps": 2},
        schedule={"warmup_steps": 1},
    )
    assert ranks.train(config).codes == [0, 0]
    changed = ("optimizer.weight_decay=0.5", "optimizer.beta1=0.8", "optimizer.beta2=0.9")
    changed = (*changed, "optimizer.gradient_clipping=0.25", "schedule.decay=linear")
    run_folder = folder / "runs" / name
    for choice, decay, beta1, clipping, step in (
        ("checkpoint", 0.05, 0.9, 1.0, 3),
        ("config", 0.5, 0.8, 0.25, 4),
    ):
        (run_folder / "DONE").unlink()
        # The first save has no average, the second one has, and at last none is wanted.
        decay_of_average = f"training.ema_decay={0.5 if step == 3 else 0}"
        words = (f"training.max_steps={step}", decay_of_average, f"checkpoint.resume={choice}")
        outcome = ranks.train(config, *changed, *words)
        assert outcome.codes == [0, 0], outcome.log[-3000:]
        facts = read_manifest(run_folder / "checkpoints" / f"step_{step}").facts
        numbers = facts["hyperparameters"]["model"]
        engine_folder = run_folder / "checkpoints" / f"step_{step}" / "model"
        assert has_average(engine_folder) == (step == 3)
        if step == 3:
            told_of_average = "starts from the weights of step 2"
            assert read_average(engine_folder, 1).updates == 1
            assert facts["validation"]["weights"] == "average"
            listed = read_manifest(engine_folder.parent).files
            assert average_file(Path("model"), 1).as_posix() in listed
        else:
            told_of_average = "this run keeps none (training.ema_decay: 0): it ends here"
        assert outcome.log.count(told_of_average) == 1
        assert [group["weight_decay"] for group in numbers["groups"]] == [decay, 0.0]
        assert [group["betas"][0] for group in numbers["groups"]] == [beta1, beta1]
        assert numbers["gradient_clipping"] == clipping
        told = load_run_settings(run_folder, environ={})
        assert (told.optimizer.weight_decay, told.optimizer.beta1) == (decay, beta1)
        row = next(
            line for line in outcome.log.splitlines() if "weight decay of group 0" in line
        ).split()
        assert row[-3:] == ["0.5", "0.05", f"{decay:g}"]
    (run_folder / "DONE").unlink()
    refused = ranks.train(config, "training.max_steps=5", "checkpoint.resume=ask")
    assert refused.codes == [2, 2]
    assert "optimizer.weight_decay 0.05 -> 0.5" in refused.log
    assert "give checkpoint.resume=config or checkpoint.resume=checkpoint" in refused.log
    other = ranks.train(config, "training.max_steps=5", "seed=7", "checkpoint.resume=checkpoint")
    assert other.codes == [3, 3]
    assert "was trained on something else: seed (was 0, is 7)" in other.log


def test_the_diff_has_every_number_of_the_three(tmp_path):
    old = load_run_settings(
        tiny_runs.write_run(tmp_path, "a", "vqvae", optimizer={"weight_decay": 0.1}), environ={}
    )
    new = load_run_settings(tiny_runs.write_run(tmp_path, "b", "vqvae", seed=3), environ={})
    effective = settled(new, old, "checkpoint")
    assert effective.optimizer.weight_decay == 0.1
    assert effective.seed == 3
    rows = {row.name: row for row in settings_rows(new, old, effective)}
    assert rows["seed"].is_content
    assert rows["batch.micro_batch_images"].differs is False
    decay = rows["optimizer.weight_decay"]
    assert (decay.config, decay.checkpoint, decay.effective) == (0.05, 0.1, 0.1)
    built = {"model": {"groups": [{"weight_decay": 0.1}, {"weight_decay": 0.0}]}}
    facts = {"hyperparameters": {"model": {"groups": [{"weight_decay": 0.1}]}}, "content": {}}
    group, bare, data, code = facts_rows(
        new, facts, built, {"training_pictures": "f" * 64}, {"lgpt": "1", "commit": "c" * 40}
    )
    assert (group.config, group.checkpoint, group.effective) == (0.05, 0.1, 0.1)
    assert (bare.config, bare.checkpoint, bare.effective) == (0.0, None, 0.0)
    assert data.is_content
    assert code.config == "1 (cccccccccccc)"
    table = table_of([decay, data])
    assert table.splitlines()[0].split("  ")[-1] == "effective"
    assert "*  optimizer.weight_decay" in table


def test_a_model_or_loss_that_fits_and_is_another_one_is_told_and_no_old_number(ranks, folder):
    """Without norms of queries and keys no shape tells how many heads there were."""
    model = {"qk_norm": False, "dropout": 0.0}
    changes = {"training": {"max_steps": 2}, "schedule": {"warmup_steps": 1}}
    config = tiny_runs.write_run(folder, "heads", "transformer", transformer=model, **changes)
    assert ranks.train(config, ranks=1).codes == [0]
    words = ("training.max_steps=3", "transformer.heads=4", "transformer.attention=sdpa")
    refused = ranks.train(config, *words, "checkpoint.resume=checkpoint", ranks=1)
    assert refused.codes == [3]
    assert "was trained on something else: transformer.heads (was 2, is 4). Give" in refused.log
    went_on = ranks.train(config, *words, ranks=1)
    assert went_on.codes == [0]
    (row,) = [line for line in went_on.log.splitlines() if "*  transformer." in line]
    assert row.split() == ["*", "transformer.heads", "4", "2", "4"]
    assert "train another model or loss than those before: transformer.heads (was" in went_on.log


def test_how_the_head_once_started_is_no_difference(tmp_path):
    """Its default has changed: a run that began before goes on without a warning."""
    path = tiny_runs.write_run(tmp_path, "a", "transformer")
    old = load_run_settings(path, ["transformer.zero_head=true"], environ={})
    new = load_run_settings(path, ["transformer.zero_head=false"], environ={})
    assert not [row for row in settings_rows(new, old, new) if row.is_model]


def test_the_diff_tells_what_differs_in_a_vqvae_and_its_loss(tmp_path):
    path = tiny_runs.write_run(tmp_path, "a", "vqvae")
    old = load_run_settings(path, environ={})
    new = load_run_settings(path, ["vqvae.dropout=0.3", "loss.reconstruction=l2"], environ={})
    rows = [row for row in settings_rows(new, old, new) if row.is_model]
    assert [(row.name, row.config, row.checkpoint) for row in rows] == [
        ("loss.reconstruction", "l2", "l1"),
        ("vqvae.dropout", 0.3, 0.1),
    ]
