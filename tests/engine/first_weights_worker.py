"""One of two ranks: engines around models that began on the meta device, and what came of it.

Not a test module: test_first_weights.py starts it and reads what each rank writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lgpt.core.distributed import leave_process_group, rank
from lgpt.engine import build
from lgpt.engine.start import afford_bf16, load_deepspeed, start_process_group
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.settings.training import OptimizerSettings

CONFIG = LatentGPTConfig(48, 3, 3, 8, layers=3, hidden=16, heads=2, zero_head=False)


def on_meta() -> LatentGPT:
    with torch.device("meta"):
        return LatentGPT(CONFIG)


def bytes_held(model: nn.Module) -> int:
    """Of weights, partitioned or not, that this rank holds."""
    return sum(
        getattr(parameter, "ds_tensor", parameter).untyped_storage().nbytes()
        for parameter in model.parameters()
        if not parameter.is_meta
    )


def built(stage: int, is_bf16: bool) -> dict[str, Any]:
    torch.manual_seed(rank())  # DeepSpeed sends rank 0's
    model = on_meta()
    most = 0
    draw = model.initialize

    def watched(module: nn.Module) -> None:
        nonlocal most
        most = max(most, bytes_held(model))
        draw(module)

    model.initialize = watched
    ds_config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": is_bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    reached, kept = ["build"], []
    build.keep_freed_memory = lambda device: kept.append((reached[-1], device.type))
    engine = build.build_engine(model, OptimizerSettings(learning_rate=1e-2), ds_config)
    gathered = load_deepspeed().zero.GatheredParameters
    with gathered(list(model.parameters()), enabled=stage == 3):
        weights = {name: p.detach().float().tolist() for name, p in model.named_parameters()}
    tokens, text = torch.randint(48, (2, 9)), torch.randn(2, 4, 8)
    text = text.bfloat16() if is_bf16 else text
    losses = []
    for step in ("first", "second", "third"):
        reached.append(step)
        loss = engine(tokens, text, targets=tokens)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    engine.destroy()
    return {"most_bytes": most, "weights": weights, "losses": losses, "memory_kept": kept}


def main() -> None:
    afford_bf16(start_process_group())
    results = {
        f"{stage} {bf16}": built(stage, bf16) for stage in (1, 2, 3) for bf16 in (False, True)
    }
    Path(sys.argv[1], f"{rank()}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
