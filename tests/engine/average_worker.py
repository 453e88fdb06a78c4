"""Run as two ranks: averages of weights at every stage, what they do and leave.

Not a test module: test_average.py starts it with 2 ranks and reads what it writes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lgpt.core.distributed import is_rank_zero, leave_process_group, rank, seed_everything
from lgpt.engine.average import WeightAverage
from lgpt.engine.build import build_engine
from lgpt.engine.rows import set_rows
from lgpt.engine.start import start_process_group
from lgpt.settings.training import OptimizerSettings

CASES = {
    "zero1_fp32": (1, "fp32"),
    "zero1_bf16": (1, "bf16"),  # with float32 gradients: DeepSpeed's BF16_Optimizer
    "zero2_fp32": (2, "fp32"),
    "zero2_bf16": (2, "bf16"),
    "zero3_fp32": (3, "fp32"),
    "zero3_bf16": (3, "bf16"),
}
STEPS, DECAY, LEARNING_RATE, WIDTH = 10, 0.6, 0.02, 5


class OddModel(nn.Module):
    """Sizes that two ranks do not divide, a frozen layer, and a buffer that moves by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 7)
        self.norm = nn.LayerNorm(7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.last = nn.Linear(7, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls.add_(1)
        return self.last(self.norm(self.frozen(torch.tanh(self.first(inputs)))))


def make_model() -> OddModel:
    seed_everything(3)
    return OddModel()


def batch_of(step: int) -> torch.Tensor:
    """Of all ranks: two pictures, so to speak, each."""
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


def loss_of(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.float().square().mean() + outputs.float().mean()


def make_engine(stage: int, precision: str) -> Any:
    ds_config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        # Small parameters stay whole, the others are cut.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8},
        "zero_allow_untested_optimizer": True,
    }
    return build_engine(make_model(), OptimizerSettings(learning_rate=LEARNING_RATE), ds_config)


def step_of(engine: Any, step: int, factor: float = 1.0) -> None:
    mine = batch_of(step)[2 * rank() : 2 * rank() + 2]
    outputs = engine(mine.to(next(engine.module.parameters()).dtype))
    engine.backward(loss_of(outputs) * factor)
    engine.step()


def masters_of(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(parameter).clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def module_of(engine: Any) -> dict[str, torch.Tensor]:
    """What the model computes with, whole."""
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return weights


def outputs_of(engine: Any) -> torch.Tensor:
    engine.eval()
    with torch.no_grad():
        inputs = batch_of(99).to(next(engine.module.parameters()).dtype)
        outputs = engine(inputs).float()
    engine.train()
    return outputs


def set_rows_of(engine: Any, average: WeightAverage) -> dict[str, Any]:
    """Rows of a cut matrix, in the weights and in their average, which is elsewhere before."""
    step_of(engine, STEPS + 1)
    parameter, rows = engine.module.last.weight, torch.tensor([0, 2])
    values = torch.arange(14.0).view(2, 7) / 8  # exact in bf16
    with average.in_use():
        before = masters_of(engine)
    raw = masters_of(engine)
    set_rows(engine, parameter, rows, values)
    average.set_rows(parameter, rows, values)
    found = {"values": values, "average before": before, "before": raw}
    found["after"], found["module"] = masters_of(engine), module_of(engine)
    with average.in_use():
        found["average after"], found["module in use"] = masters_of(engine), module_of(engine)
    return found


def run_case(stage: int, precision: str) -> dict[str, Any]:
    engine = make_engine(stage, precision)
    average = WeightAverage(engine, DECAY)
    path = [masters_of(engine)]
    for step in range(STEPS):
        step_of(engine, step)
        average.update()
        path.append(masters_of(engine))
    found: dict[str, Any] = {"before": module_of(engine), "masters": path[-1], "path": path}
    found["outputs before"] = outputs_of(engine)
    with average.in_use():
        found["average"], found["in use"] = masters_of(engine), module_of(engine)
        found["outputs in use"] = outputs_of(engine)
    found["after"], found["masters after"] = module_of(engine), masters_of(engine)
    found["outputs after"] = outputs_of(engine)

    kept = [vector.clone() for vector in average.state().vectors]
    found["share"] = sum(vector.numel() for vector in average._vectors)
    step_of(engine, STEPS, factor=float("inf"))
    average.update()
    found["skipped"] = engine.skipped_steps
    found["updates after the skipped step"] = average.updates
    found["moved by the skipped step"] = not all(map(torch.equal, kept, average.state().vectors))
    step_of(engine, STEPS)
    average.update()
    found["moved by the next step"] = not all(map(torch.equal, kept, average.state().vectors))
    average.load(kept, STEPS)
    found["loaded"] = all(map(torch.equal, kept, average.state().vectors))
    try:
        average.load([vector[:-1] for vector in kept], STEPS)
    except ValueError as error:
        found["refusal"] = str(error)
    average.restart()
    with average.in_use():
        found["restarted"] = masters_of(engine)
    found["end"] = masters_of(engine)

    found["rows"] = set_rows_of(engine, average)
    other = make_engine(stage, precision)  # the same steps without an average beside them
    for step in range(STEPS):
        step_of(other, step)
    step_of(other, STEPS)
    found["end without an average"] = masters_of(other)
    return found


def main() -> None:
    words = sys.argv[1:]
    start_process_group()
    results = {name: run_case(*case) for name, case in CASES.items()}
    if is_rank_zero():
        torch.save(results, Path(words[0]))
    leave_process_group()


if __name__ == "__main__":
    main()
