"""Run by test_elastic.py: one state handed on from ranks to other ranks and ZeRO stages.

Everything is imported once; then each link of the chain is forked with its number of ranks, loads
what the link before it saved, compares it with what the engine of the very first save held, and
saves it again.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import tiny_models
import torch
from two_rank_saves import ds_config_of, live_moments, live_weights, make_engine, save, train

from lgpt.checkpoint import elastic, load
from lgpt.checkpoint.convert import merged_weights
from lgpt.core.distributed import barrier, is_rank_zero, rank
from lgpt.core.errors import CheckpointError
from lgpt.engine.average import WeightAverage
from lgpt.engine.build import build_engine
from lgpt.engine.masters import master_vectors
from lgpt.engine.partitions import stretches, trained_shapes
from lgpt.engine.start import load_deepspeed, start_process_group
from lgpt.settings.training import OptimizerSettings

# Ranks and ZeRO stage of each link; the first loads what two ranks saved.
LINKS = ((1, 3), (4, 2), (3, 3), (2, 1))
CASES = {"zero2_fp32": "fp32", "zero3_bf16": "bf16"}


def run_link(out: Path, number: int) -> dict[str, Any]:
    """Load, compare, save again; and what the next steps give."""
    start_process_group()
    results = {}
    for case, precision in CASES.items():
        before = out / f"{case}-link-{number - 1}" / "checkpoints" / "step_3"
        source = out / case / "checkpoints" / "step_3" if number == 0 else before
        engine = make_engine(LINKS[number][1], precision, seed=2)
        refused = refusal_of_a_wrong_bit(engine, source) if number == 0 else None
        if number == 1:
            train(engine, 1)  # states that are there are written over
        average = WeightAverage(engine, 0.9)
        state = load.load_checkpoint({"model": engine}, source, {"model": average})
        live = torch.load(out / case / "live.pt")
        if number == 0:  # saved without an average: from here on it is half the weights
            average.updates = 7
            for vector in average.state().vectors:
                vector *= 0.5
        with average.in_use():
            averaged = live_weights(engine)
        results[case] = {
            "state": state,
            "refused": refused,
            "differing": differing(live_weights(engine), live)
            + differing(live_moments(engine), torch.load(out / case / "moments.pt")),
            "wrong_averages": [
                name
                for name in trained_shapes(engine)
                if not torch.equal(averaged[name], 0.5 * live[name])
            ],
            "updates": average.updates,
            "counters": [engine.global_steps, engine.skipped_steps],
            "decays": [group["weight_decay"] for group in engine.optimizer.param_groups],
            "draws": torch.rand(2).tolist(),
        }
        save(engine, out / f"{case}-link-{number}", 3, average)
        results[case]["loss"] = fixed_losses(engine)
    if number == 0:
        results["before_the_first_step"] = load_before_the_first_step(out)
    return results


def load_before_the_first_step(out: Path) -> list[str]:
    """What differs in a VQ-VAE that two ranks saved as it was made, at ZeRO-2."""
    source = out / "runs" / "phase2" / "checkpoints" / "step_7"
    engine = build_engine(tiny_models.vqvae(seed=1), OptimizerSettings(), ds_config_of(3, "fp32"))
    load.load_checkpoint({"model": engine}, source)
    assert all(not state for state in engine.optimizer.optimizer.state.values())
    return differing(live_weights(engine), merged_weights(source / "model"))


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def fixed_losses(engine: Any) -> list[float]:
    """Three steps on the same tokens on every rank, without dropout."""
    losses = []
    engine.module.dropout.p = 0.0
    for _ in range(3):
        loss = engine(torch.tensor([1, 5, 10, 2]))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def refusal_of_a_wrong_bit(engine: Any, source: Path) -> str:
    """What is said when one number does not arrive as it was read."""
    whole = elastic.write_masters_through

    def spread_a_wrong_one(engine: Any) -> None:
        if rank() == 0:
            next(stretches(engine)).of(master_vectors(engine)).data[0] += 1e-3
        whole(engine)

    elastic.write_masters_through = spread_a_wrong_one
    try:
        load.load_checkpoint({"model": engine}, source)
        return "loaded"
    except CheckpointError as error:
        return str(error)
    finally:
        elastic.write_masters_through = whole


def main() -> None:
    out = Path(sys.argv[-1])
    load_deepspeed()
    for number, (ranks, _) in enumerate(LINKS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
        children = [be_a_rank(out, number, each, ranks) for each in range(ranks)]
        assert all(os.waitpid(child, 0)[1] == 0 for child in children), f"link {number} failed"


def be_a_rank(out: Path, number: int, mine: int, ranks: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(RANK=str(mine), LOCAL_RANK=str(mine), WORLD_SIZE=str(ranks))
        results = run_link(out, number)
        barrier()
        (out / f"link_{number}_rank_{mine}.json").write_text(json.dumps(results))
        assert is_rank_zero() == (mine == 0)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
