"""Run by test_saves.py on two ranks under the deepspeed launcher: saves, resumes, fails, dies.

Each case trains a tiny model, saves it, and writes what the live engine holds beside the
checkpoint; the tests compare. The last save is killed between staging and rename.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tiny_models
import torch
from torch import nn

from lgpt.checkpoint import load, store
from lgpt.checkpoint.retention import Keep
from lgpt.checkpoint.warm_start import load_first_weights
from lgpt.core.distributed import barrier, is_rank_zero, rank, seed_everything
from lgpt.core.errors import CheckpointError
from lgpt.engine.average import WeightAverage
from lgpt.engine.build import build_engine, set_masters
from lgpt.engine.start import start_process_group
from lgpt.settings.training import OptimizerSettings

CASES = {
    "zero1_fp32": (1, "fp32"),
    "zero2_fp32": (2, "fp32"),
    "zero2_bf16": (2, "bf16"),
    "zero3_fp32": (3, "fp32"),
    "zero3_bf16": (3, "bf16"),
}


class TinyModel(nn.Module):
    """A tied head, a frozen layer, odd sizes (padding), a float32 and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.frozen = nn.Linear(7, 5).requires_grad_(False)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("running_mean", torch.full((3,), 1.0 / 3.0))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.running_mean.mul_(1.01)
        self.calls.add_(1)
        hidden = self.dropout(self.norm(self.first(self.embedding(tokens))))
        logits = self.head(self.frozen(hidden))
        return nn.functional.cross_entropy(logits.float(), tokens)


def ds_config_of(stage: int, precision: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": precision == "bf16"},
        # The small threshold leaves some parameters persistent and cuts others.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8},
        "zero_allow_untested_optimizer": True,
    }


def make_engine(stage: int, precision: str, seed: int) -> Any:
    seed_everything(seed)
    ds_config = ds_config_of(stage, precision)
    engine = build_engine(TinyModel(), OptimizerSettings(learning_rate=0.05), ds_config)
    seed_everything(seed, rank())
    return engine


def train(engine: Any, steps: int) -> list[float]:
    """Losses that depend on every generator: tokens from numpy and Python, dropout from torch."""
    losses = []
    for _ in range(steps):
        tokens = [random.randrange(11), *np.random.randint(0, 11, size=3).tolist()]
        loss = engine(torch.tensor(tokens))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def live_weights(engine: Any) -> dict[str, torch.Tensor]:
    """float32 masters, frozen parameters and buffers as the engine holds them now."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            weights[name] = safe_get_full_fp32_param(parameter).clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().float().clone()
    return weights


def live_moments(engine: Any) -> dict[str, torch.Tensor]:
    """AdamW's two moments of every parameter as the engine holds them now."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed 0.19.8 links them after the step of the first group; the others have none then.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return {
        f"{kind} of {name}": safe_get_full_optimizer_state(parameter, kind).clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
        for kind in ("exp_avg", "exp_avg_sq")
    }


def save(engine: Any, run_folder: Path, step: int, average: Optional[WeightAverage] = None) -> Path:
    return store.save_checkpoint(
        {"model": engine},
        run_folder,
        step,
        trainer_state={"step": step, "note": "ä"},
        keep=Keep(2),
        extra_files={"config.yaml": "name: tiny\n"},
        averages={} if average is None else {"model": average},
    )


def save_average(stage: int, precision: str, run_folder: Path) -> None:
    """A checkpoint with an average, which is gathered beside it as the engine holds it."""
    engine = make_engine(stage, precision, seed=1)
    average = WeightAverage(engine, 0.5)
    for _ in range(2):
        train(engine, 1)
        average.update()
    save(engine, run_folder, 2, average)
    with average.in_use():
        weights = live_weights(engine)
    if is_rank_zero():
        torch.save(weights, run_folder / "live.pt")


def run_case(stage: int, precision: str, run_folder: Path) -> dict[str, Any]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = make_engine(stage, precision, seed=1)
    for step in (1, 2):
        train(engine, 1)
        save(engine, run_folder, step)
    train(engine, 1)
    folder = save(engine, run_folder, 3)
    weights, moments = live_weights(engine), live_moments(engine)
    if is_rank_zero():
        torch.save(weights, run_folder / "live.pt")
        torch.save(moments, run_folder / "moments.pt")
        second = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="model")
        torch.save(dict(second), run_folder / "deepspeed.pt")
    straight = train(engine, 3)
    other = make_engine(stage, precision, seed=2)
    train(other, 1)
    state = load.load_checkpoint({"model": other}, folder)
    resumed = train(other, 3)
    same = all(
        torch.equal(mine, its)
        for mine, its in zip(live_weights(engine).values(), live_weights(other).values())
    )
    return {
        "state": state,
        "straight": straight,
        "resumed": resumed,
        "ends_in_the_same_weights": same,
        "full_disk": save_on_full_disk(engine, run_folder),
        "after_full_disk": save(engine, run_folder, 5).name,
        "engine": engine,
    }


def save_on_full_disk(engine: Any, run_folder: Path) -> str:
    """Rank 1 may write 3,000 bytes a file: its generators fit, its DeepSpeed shard does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        save(engine, run_folder, 4)
        return "saved"
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_with_bf16_optimizer(out: Path) -> None:
    """As DeepSpeed alone saves stage 1 in bf16 with float32 gradients."""
    seed_everything(1)
    ds_config = {**ds_config_of(1, "bf16"), "data_types": {"grad_accum_dtype": "fp32"}}
    engine = build_engine(TinyModel(), OptimizerSettings(learning_rate=0.05), ds_config)
    train(engine, 2)
    engine.save_checkpoint(str(out), tag="global_step2")
    weights = live_weights(engine)
    if is_rank_zero():
        torch.save(weights, out / "live.pt")


def start_warm(source: Path) -> dict[str, torch.Tensor]:
    """What a fresh ZeRO-3 engine in bf16 holds that starts on the weights of a step folder."""
    seed_everything(9)
    model = TinyModel()
    weights, _ = load_first_weights(model, source, {"kind": "tiny", "config": {}})
    engine = build_engine(model, OptimizerSettings(), ds_config_of(3, "bf16"))
    set_masters(engine, weights)
    return live_weights(engine)


def refusal(engines: dict[str, Any], folder: Path) -> str:
    try:
        load.load_checkpoint(engines, folder)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def save_models(out: Path) -> None:
    """A phase 2 run (ZeRO-2, float32) and a phase 3 run (ZeRO-3, bf16) of the real classes."""
    if is_rank_zero():
        tiny_models.write_parts(out)
    barrier()
    for name, make in (("phase2", tiny_models.vqvae), ("phase3", tiny_models.transformer)):
        stage, precision = (2, "fp32") if name == "phase2" else (3, "bf16")
        engine = build_engine(make(), OptimizerSettings(), ds_config_of(stage, precision))
        store.save_checkpoint(
            {"model": engine},
            out / "runs" / name,
            7,
            trainer_state={"step": 7},
            keep=Keep(2),
            extra_files=tiny_models.texts_of(out, name),
        )


def main() -> None:
    out = Path(sys.argv[-1])
    start_process_group()
    save_models(out)
    results: dict[str, Any] = {}
    engines = {}
    for name, (stage, precision) in CASES.items():
        (out / name).mkdir(exist_ok=True)
        barrier()
        results[name] = run_case(stage, precision, out / name)
        engines[name] = results[name].pop("engine")
        save_average(stage, precision, out / "averaged" / name)
    save_with_bf16_optimizer(out / "bf16_optimizer")
    warm = start_warm(out / "zero2_bf16" / "checkpoints" / "step_3")
    if is_rank_zero():
        torch.save(warm, out / "warm.pt")
    results["other_precision"] = refusal(
        {"model": engines["zero2_fp32"]}, out / "zero2_bf16" / "checkpoints" / "step_5"
    )
    damaged = out / "zero3_bf16" / "checkpoints" / "step_5"
    if is_rank_zero():
        shard = next((damaged / "model").glob("*rank_1*optim_states.pt"))
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    barrier()
    results["damaged"] = str(load.find_whole_checkpoint(out / "zero3_bf16"))
    (out / f"results_{rank()}.json").write_text(json.dumps(results))
    barrier()

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    store._publish = die
    save(engines["zero2_bf16"], out / "zero2_bf16", 6)


if __name__ == "__main__":
    main()
