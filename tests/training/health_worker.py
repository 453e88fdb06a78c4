"""Run as two ranks: a collapsed codebook and a winning discriminator, as files.

Not a test module: test_health_response.py starts it with 2 ranks and compares what it writes.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from gan_worker import ds_config_of, weights_of

from lgpt.core.distributed import is_rank_zero, leave_process_group, rank, seed_everything
from lgpt.engine.build import set_learning_rate
from lgpt.engine.start import afford_bf16, start_process_group
from lgpt.settings.run import load_run_settings
from lgpt.training.train_vqvae import VqvaeTask


def codebook_of(engine: Any) -> dict[str, torch.Tensor]:
    """The codes that forwards use, their masters, and AdamW's moments of them."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    parameter = engine.module.quantize.embedding.weight
    if not hasattr(parameter, "ds_tensor"):
        # DeepSpeed 0.19.8 looked for moments before the second group had any.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
        used = parameter.detach().clone()
    moments = {
        key: safe_get_full_optimizer_state(parameter, key).clone().view_as(used)
        for key in ("exp_avg", "exp_avg_sq")
    }
    master = safe_get_full_fp32_param(parameter).clone().view_as(used)
    return {"used": used, "master": master, **moments}


def run_case(config: Path, case: dict[str, Any]) -> dict[str, Any]:
    run = load_run_settings(config, case["overrides"], environ={}, world_size=2)
    seed_everything(run.seed)
    task = VqvaeTask(run, torch.device("cpu"))
    task.build_engines(ds_config_of(run, case["stage"]))
    seed_everything(run.seed, rank())
    metrics, codebooks = [], {}
    for step in range(run.training.max_steps):
        set_learning_rate(task.engine, run.optimizer.learning_rate)
        metrics.append(dict(task.train_step(step)))
        if "restarted_codes" in metrics[-1]:
            codebooks[step] = codebook_of(task.engine)
    weights = {name: weights_of(engine) for name, engine in task.engines().items()}
    for engine in task.engines().values():
        engine.destroy()
    gc.collect()
    return {"weights": weights, "metrics": metrics, "codebooks": codebooks}


def main() -> None:
    words = sys.argv[1:]
    out, config, cases = Path(words[0]), Path(words[1]), json.loads(Path(words[2]).read_text())
    start_process_group()
    afford_bf16(torch.device("cpu"))
    for name, case in cases.items():
        result = run_case(config, case)
        if is_rank_zero():
            torch.save(result, out / f"{name}.pt")
    leave_process_group()


if __name__ == "__main__":
    main()
