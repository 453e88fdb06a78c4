"""Run as two ranks: both players' weights after 10 steps of every stage, as files.

Not a test module: test_gan.py starts it with 2 ranks and compares what it writes.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lgpt.core.distributed import is_rank_zero, leave_process_group, rank, seed_everything
from lgpt.engine.build import set_learning_rate
from lgpt.engine.start import afford_bf16, start_process_group
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.phases import Phase2
from lgpt.settings.run import load_run_settings
from lgpt.training.train_vqvae import VqvaeTask


def ds_config_of(run: Phase2, stage: int) -> dict[str, Any]:
    config = resolve_deepspeed_config(run, 2)
    config["zero_optimization"]["stage"] = stage
    # As in the real configs, larger than the model: nothing of the trial may stay in it.
    config["zero_optimization"]["reduce_bucket_size"] = 2**22
    # Everything is cut and gathered at stage 3, also vectors and the last kernel.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {
        name: safe_get_full_fp32_param(parameter).clone()
        for name, parameter in engine.module.named_parameters()
    }
    return {**whole, **{name: b.clone() for name, b in engine.module.named_buffers()}}


def run_out_of_memory(task: VqvaeTask, images: int) -> None:
    """A trial for which the room ends in the first layer's backward pass, the last of all."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    hook = task.model.encoder.conv_in.register_full_backward_hook(fail)
    try:
        task.trial_batch(images)
    except torch.OutOfMemoryError:
        return
    finally:
        hook.remove()
    raise AssertionError("the trial did not go backward through the first layer")


def run_case(config: Path, case: dict[str, Any]) -> dict[str, Any]:
    run = load_run_settings(config, case["overrides"], environ={}, world_size=2)
    seed_everything(run.seed)
    task = VqvaeTask(run, torch.device("cpu"))
    task.build_engines(ds_config_of(run, case["stage"]))
    seed_everything(run.seed, rank())
    task.trial_batch(run.batch.micro_batch_images)  # plain PyTorch does without
    run_out_of_memory(task, run.batch.micro_batch_images)
    metrics = []
    for step in range(run.training.max_steps):
        set_learning_rate(task.engine, run.optimizer.learning_rate)
        metrics.append(dict(task.train_step(step)))
    weights = {name: weights_of(engine) for name, engine in task.engines().items()}
    for engine in task.engines().values():
        engine.destroy()
    gc.collect()
    return {"weights": weights, "metrics": metrics}


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
