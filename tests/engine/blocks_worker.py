"""Run as two ranks: a step's loss and gradient norm for every block setting.

Not a test module: test_blocks.py starts it with 2 ranks and reads what it writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from lgpt.core.distributed import is_rank_zero, leave_process_group, rank
from lgpt.engine.blocks import apply_block_settings
from lgpt.engine.build import build_engine, gradient_norm
from lgpt.engine.start import start_process_group
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.settings.blocks import BlockSettings
from lgpt.settings.training import OptimizerSettings

STEPS = 3
SHAPE: dict[str, Any] = {"layers": 3, "hidden": 16, "heads": 2, "zero_head": False}


def run_steps(stage: int, dropout: float, blocks: BlockSettings) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    model = LatentGPT(LatentGPTConfig(32, 3, 3, 8, dropout=dropout, **SHAPE))
    apply_block_settings(model, blocks)
    ds_config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine = build_engine(model, OptimizerSettings(learning_rate=1e-2), ds_config)
    torch.manual_seed(1 + rank())
    tokens, text = torch.randint(32, (2, 9)), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    nobody = torch.zeros(2, dtype=torch.bool)
    seen = []
    for _ in range(STEPS):
        loss = engine(tokens, text, mask, targets=tokens, null_text=nobody)
        engine.backward(loss)
        engine.step()
        seen.append((float(loss.detach()), gradient_norm(engine)))
    engine.destroy()
    return seen


def main() -> None:
    words = sys.argv[1:]
    start_process_group()
    results: dict[str, Any] = {}
    for stage in (2, 3):
        for text in words[2:]:
            torch._dynamo.reset()
            counters.clear()
            blocks = BlockSettings.model_validate_json(text)
            results[f"{stage} {text}"] = {
                "steps": run_steps(stage, float(words[1]), blocks),
                "graphs": counters["stats"]["unique_graphs"],
                "graph_breaks": dict(counters["graph_break"]),
            }
    if is_rank_zero():
        Path(words[0]).write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
