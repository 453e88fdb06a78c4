"""Run as two ranks: losses of 20 steps for every stage and precision, as JSON.

Not a test module: test_zero_equals_torch.py starts it with 2 ranks and reads what it writes.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lgpt.core.distributed import is_rank_zero, leave_process_group, rank, seed_everything
from lgpt.engine.build import build_engine, gradient_norm, set_learning_rate
from lgpt.engine.ranks import mean_over_ranks
from lgpt.engine.start import afford_bf16, start_process_group
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.phases import Phase2
from lgpt.settings.run import load_run_settings
from lgpt.training.train_transformer import TransformerTask
from lgpt.training.train_vqvae import VqvaeTask


def run_steps(config: Path, stage: int, precision: str) -> dict[str, Any]:
    run = load_run_settings(
        config, [f"training.precision={precision}", f"deepspeed=zero{stage}_bf16"], environ={}
    )
    seed_everything(run.seed)
    device = torch.device("cpu")
    task = (VqvaeTask if isinstance(run, Phase2) else TransformerTask)(run, device)
    ds_config = resolve_deepspeed_config(run, 2)
    task.engine = build_engine(task.model, run.optimizer, ds_config)
    seed_everything(run.seed, rank())
    losses, norms = [], []
    for step in range(run.training.max_steps):
        set_learning_rate(task.engine, run.optimizer.learning_rate)
        metrics = mean_over_ranks(dict(task.train_step(step)), device)
        losses.append(metrics[task.main_loss])
        norms.append(gradient_norm(task.engine))
    dtype = str(next(task.engine.module.parameters()).dtype)
    task.engine.destroy()
    gc.collect()
    return {"losses": losses, "norms": norms, "dtype": dtype}


def main() -> None:
    words = sys.argv[1:]
    out, configs = Path(words[0]), [Path(word) for word in words[1:]]
    start_process_group()
    afford_bf16(torch.device("cpu"))
    results = {
        f"{config.stem}-zero{stage}-{precision}": run_steps(config, stage, precision)
        for config in configs
        for stage in (2, 3)
        for precision in ("fp32", "bf16")
        if precision == "fp32" or config.stem != "vqvae_averages"  # its restarts amplify noise
    }
    if is_rank_zero():
        out.write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
