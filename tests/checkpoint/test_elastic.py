"""Runs that go on with other ranks or another ZeRO stage: nothing of their state changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from elastic_chain import CASES, LINKS
from test_resume import steps_of

from lgpt.checkpoint.elastic import checksum

WORKER = Path(__file__).with_name("elastic_chain.py")


def test_a_checksum_does_not_depend_on_the_cuts_and_changes_with_every_bit():
    torch.manual_seed(0)
    values = torch.randn(700_001)
    whole = checksum(values, 0)
    for cuts in ([3, 700_000], [262_144, 262_145], [1, 350_000, 600_000]):
        bounds = [0, *cuts, len(values)]
        parts = [checksum(values[a:b], a) for a, b in zip(bounds, bounds[1:])]
        assert sum(parts) == whole
    swapped = values.clone()
    swapped[[10, 500_000]] = values[[500_000, 10]]
    others = [swapped]
    for bit in range(32):
        flipped = values.clone()
        flipped.view(torch.int32)[12_345] ^= -(2**31) if bit == 31 else 1 << bit
        others.append(flipped)
    assert len({int(checksum(other, 0)) for other in [values, *others]}) == 34
    assert checksum(torch.tensor([0.0]), 0) != checksum(torch.tensor([-0.0]), 0)


@pytest.fixture(scope="module")
def links(saves) -> list[list[dict[str, Any]]]:
    """Results of every link of the chain, rank by rank."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(saves.folder)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(WORKER.parents[2]),
        },
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return [
        [
            json.loads((saves.folder / f"link_{number}_rank_{rank}.json").read_text())
            for rank in range(ranks)
        ]
        for number, (ranks, _) in enumerate(LINKS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_weights_moments_and_buffers_are_handed_on_bit_for_bit(links, case):
    """DeepSpeed's own getters say so, from 2 ranks over 1, 4 and 3 to 2, at stages 1, 2 and 3."""
    for number, link in enumerate(links):
        for result in link:
            assert result[case]["differing"] == [], LINKS[number]
            assert result[case]["wrong_averages"] == []
            assert result[case]["updates"] == 7
            assert result[case]["state"] == {"step": 3, "note": "ä"}
            assert result[case]["counters"] == [3, 0]
            assert result[case]["decays"] == [0.05, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_next_steps_are_the_same_on_any_ranks_and_stage(links, case):
    """AdamW's step count, the weights it computes with and the buffers came along.

    Up to the order in which gradients are summed, and in bf16 the rounding of what ranks send.
    """
    tolerance = 1e-6 if CASES[case] == "fp32" else 1e-3
    expected = links[0][0][case]["loss"]
    assert len(set(expected)) == 3
    for link in links:
        for result in link:
            assert result[case]["loss"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
def test_an_optimizer_that_has_not_stepped_comes_without_moments(links):
    """As a discriminator that does not learn yet, and with a codebook that is a buffer."""
    assert links[0][0]["before_the_first_step"] == []


@pytest.mark.slow
def test_new_ranks_draw_each_for_itself_and_every_time_the_same(links):
    draws = [tuple(result["zero2_fp32"]["draws"]) for result in links[1]]
    assert len(set(draws)) == len(draws) == 4
    # Both cases were saved with the same generators.
    assert draws == [tuple(result["zero3_bf16"]["draws"]) for result in links[1]]


@pytest.mark.slow
def test_a_number_that_does_not_arrive_is_told_and_nothing_is_loaded(links):
    said = links[0][0]["zero2_fp32"]["refused"]
    assert "is not what was read: 1 checksums differ (master of " in said
    assert "start with 2 rank(s) at ZeRO-2, as it was saved" in said


RUNS = {
    "vqvae": {
        "vqvae": {"codebook_size": 64, "ema_decay": 0.8, "dropout": 0.0},
        "loss": {"adversarial": "hinge"},
        "discriminator": {"start_step": 1, "warmup_steps": 0, "layers": 1, "channels": 16},
    },
    # From a zero head the blocks' first gradients are exactly zero, not rounding of which AdamW
    # makes full steps: five steps stay within the bound below.
    "transformer": {"transformer": {"dropout": 0.0, "zero_head": True}},
}


@pytest.mark.slow
@pytest.mark.parametrize("trains", RUNS)
def test_a_run_over_two_one_and_two_ranks_is_the_run_of_two(ranks, folder, trains):
    """Its losses up to the order of float32 sums, and every picture once an epoch.

    Weights cannot be compared: AdamW takes full steps on biases whose gradient is rounding alone.
    """
    changes = {
        **RUNS[trains],
        "deepspeed": "zero2_bf16",
        "data": {"shapes": {"train_images": 40, "val_images": 4}},
        "training": {"max_steps": 5, "validate_every": 2},
        "schedule": {"decay": "constant", "warmup_steps": 1},
    }
    straight = ranks.train(tiny_runs.write_run(folder, f"straight-{trains}", trains, **changes))
    assert straight.codes == [0, 0], straight.log[-3000:]
    config = tiny_runs.write_run(folder, f"elastic-{trains}", trains, **changes)
    run_folder = folder / "runs" / f"elastic-{trains}"
    items = []
    for steps, world, deepspeed in ((2, 2, "zero2_bf16"), (4, 1, "zero3_bf16"), (5, 2, None)):
        stage = () if deepspeed is None else (f"deepspeed={deepspeed}",)
        part = ranks.train(config, f"training.max_steps={steps}", *stage, ranks=world)
        assert part.codes == [0] * world, part.log[-3000:]
        items += part.items
        (run_folder / "DONE").unlink()
    # What the third part says of itself: it goes on at the stage of the config, ZeRO-2.
    rows = {line.split("  ")[1] if line.startswith("*") else "" for line in part.log.splitlines()}
    assert {"ranks", "model: ZeRO stage"} <= {row.strip() for row in rows}
    assert "of 1 rank(s) at ZeRO-3 were cut anew for 2 rank(s) at ZeRO-2" in part.log
    assert sorted(items) == list(range(40)) == sorted(straight.items)
    expected, got = steps_of(folder / "runs" / f"straight-{trains}"), steps_of(run_folder)
    assert len(got) == len(expected)
    for line, other in zip(got, expected):
        assert line == pytest.approx(other, rel=2e-4, abs=1e-6)
