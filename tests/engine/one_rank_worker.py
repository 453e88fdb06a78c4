"""Run as one rank: steps with and without scattering, and after a broken one, as JSON.

Not a test module: test_build.py starts it and reads the last line that it prints.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import lgpt.engine.build as build
from lgpt.core.distributed import leave_process_group
from lgpt.engine.start import afford_bf16, start_process_group
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.settings.training import OptimizerSettings

STEPS, ACCUMULATION = 3, 2
ONLY_RANK = build.world_size


def run_steps(
    precision: str, stage: int, has_others: bool
) -> tuple[list[bool], list[torch.Tensor]]:
    """Whether it scatters and overlaps, and three steps' norms, then the weights."""
    build.world_size = (lambda: 2) if has_others else ONLY_RANK
    ds_config: dict[str, Any] = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.1,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 5000,
            "overlap_comm": True,
        },
    }
    if precision == "bf16":
        ds_config["bf16"] = {"enabled": True}
        ds_config["data_types"] = {"grad_accum_dtype": "fp32"}
    torch.manual_seed(0)
    model = LatentGPT(LatentGPTConfig(32, 3, 3, None, layers=2, hidden=32, heads=2))
    engine = build.build_engine(model, OptimizerSettings(learning_rate=1e-2), ds_config)
    seen = []
    for micro_step in range(1, STEPS * ACCUMULATION + 1):
        tokens = torch.randint(32, (2, 9))
        engine.backward(engine(tokens, targets=tokens))
        engine.step()
        if micro_step % ACCUMULATION == 0:
            seen.append(torch.tensor(build.gradient_norm(engine)))
    seen += [parameter.detach().clone() for parameter in model.parameters()]
    shares = [engine.optimizer.reduce_scatter, engine.optimizer.overlap_comm]
    engine.destroy()
    return shares, seen


class TwoWays(torch.nn.Module):
    """One of two matrices, by choice: the other one gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = torch.nn.ModuleList(torch.nn.Linear(7, 7) for _ in range(2))

    def forward(self, x: torch.Tensor, way: int) -> torch.Tensor:
        return self.ways[way](x).square().mean()


def steps_in_turn(has_others: bool) -> dict[str, Any]:
    """Weights after steps through one matrix and the other, broken ones too, and where sums are."""
    build.world_size = (lambda: 2) if has_others else ONLY_RANK
    ds_config: dict[str, Any] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.05,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2},
    }
    torch.manual_seed(0)
    engine = build.build_engine(TwoWays(), OptimizerSettings(learning_rate=0.1), ds_config)
    places, norms = [], []
    for ways in ((0, 0), (1, 1), (0, 1), (1, 0), (1, 1), (0, 0)):
        for micro_step, way in enumerate(ways):
            x = torch.randn(4, 7).bfloat16()
            is_broken = len(norms) == 3 and micro_step == 0
            engine.backward(engine(x * torch.inf if is_broken else x, way))
            places.append(engine.optimizer.averaged_gradients[0].flat_partition.data_ptr())
            engine.step()
        norms.append(build.gradient_norm(engine))
    weights = [parameter.detach().float().flatten() for parameter in engine.module.parameters()]
    engine.destroy()
    return {"norms": norms, "places": len(set(places)), "weights": torch.cat(weights).tolist()}


def steps_after_a_broken_one(stage: int) -> dict[str, Any]:
    """Four steps in bf16 with the optimizer on the CPU, of which the second has no finite loss."""
    ds_config: dict[str, Any] = {
        "train_batch_size": 2,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    }
    torch.manual_seed(0)
    model = LatentGPT(LatentGPTConfig(32, 3, 3, None, layers=1, hidden=32, heads=2, dropout=0.0))
    engine = build.build_engine(model, OptimizerSettings(learning_rate=1e-3), ds_config)
    tokens = torch.randint(32, (2, 9))
    seen = []
    for factor in (1.0, float("inf"), 1.0, 1.0):
        loss = engine(tokens, targets=tokens) * factor
        engine.backward(loss)
        engine.step()
        seen.append((float(loss), bool(engine.optimizer.overflow)))
    engine.destroy()
    return {"losses": [loss for loss, _ in seen], "skipped": [skipped for _, skipped in seen]}


def main() -> None:
    start_process_group()
    afford_bf16(torch.device("cpu"))
    results = {}
    for precision, stage in (("fp32", 1), ("fp32", 2), ("bf16", 2)):
        alone, got = run_steps(precision, stage, has_others=False)
        among_others, expected = run_steps(precision, stage, has_others=True)
        results[f"{precision} {stage}"] = {
            "shares": [alone, among_others],
            "equal": [torch.equal(one, other) for one, other in zip(got, expected)],
            "norms": [float(norm) for norm in got[:STEPS]],
        }
    in_turn = [steps_in_turn(has_others) for has_others in (False, True)]
    broken = {stage: steps_after_a_broken_one(stage) for stage in (1, 2, 3)}
    leave_process_group()
    print(json.dumps({"scattering": results, "in_turn": in_turn, "broken": broken}))


if __name__ == "__main__":
    main()
