"""Phase 2, killed with SIGKILL between two saves, goes on bit for bit: losses and both players."""

from __future__ import annotations

import signal

import pytest
import tiny_runs
import torch
from forked_ranks import Kill
from test_resume import steps_of

from lgpt.checkpoint.convert import merged_weights

pytestmark = pytest.mark.slow
STEPS = 12
CHANGES = {
    "vqvae": {
        "codebook_size": 64,
        "ema_decay": 0.5,
    },
    "loss": {"adversarial": "hinge"},
    "discriminator": {
        "start_step": 2,
        "warmup_steps": 1,
        "layers": 1,
        "channels": 16,
        "adaptive_weight": True,
        "lecam_weight": 0.05,
    },
    # The first window is full with the step of the save, and its codes restart in the next one.
    "health": {
        "codebook_window_tokens": 3 * 8 * 16,
        "least_codebook_usage": 1.0,
        "discriminator_window_steps": 3,
        "least_discriminator_loss": 0.49,
    },
    "training": {"max_steps": STEPS, "validate_every": 3},
    "checkpoint": {"every_steps": 5},
}


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_of_both_players_goes_on_bit_for_bit(ranks, folder, world):
    straight, killed = f"straight-{world}", f"killed-{world}"
    config = tiny_runs.write_run(folder, straight, "vqvae", **CHANGES)
    assert ranks.train(config, ranks=world).codes == [0] * world
    config = tiny_runs.write_run(folder, killed, "vqvae", **CHANGES)
    kill = Kill("step", 8, 0.0, ranks=tuple(range(world)))
    died = ranks.train(config, ranks=world, kill=kill)
    assert died.codes == [-signal.SIGKILL] * world, died.log[-3000:]
    assert not (folder / "runs" / killed / "DONE").exists()
    went_on = ranks.train(config, ranks=world)
    assert went_on.codes == [0] * world, went_on.log[-3000:]
    assert "Going on from" in went_on.log
    assert "step_5" in went_on.log

    ends = [folder / "runs" / name for name in (straight, killed)]
    steps = steps_of(ends[0])
    assert steps_of(ends[1]) == steps
    assert sum(line.get("revived_codes", 0.0) for line in steps) > 0
    restarted = [line["step"] for line in steps if "restarted_codes" in line]
    assert 6 in restarted, "due at the save, done by the run that went on"
    assert steps[-1]["step"] == STEPS
    for player in ("model", "discriminator"):
        weights = [merged_weights(end / "checkpoints" / f"step_{STEPS}" / player) for end in ends]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    exported = [(end / "model" / "model.safetensors").read_bytes() for end in ends]
    assert exported[0] == exported[1]
