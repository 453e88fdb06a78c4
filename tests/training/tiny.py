"""Tiny runs of every phase, for tests: seconds on one core, the real classes with small numbers."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import yaml

from lgpt.training.bench_ranks import run_ranks

COMMON: dict[str, Any] = {
    "data": {
        "dataset": "shapes",
        "resolution": 16,
        "shapes": {"train_images": 48, "val_images": 16},
    },
    "batch": {"global_batch_images": 8, "micro_batch_images": 2},
    "schedule": {"warmup_steps": 2},
    "checkpoint": {"every_steps": 4},
}
VQVAE = {
    "codebook_size": 32,
    "code_dim": 8,
    "z_channels": 32,
    "ch": 32,
    "ch_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "resolution": 16,
    "codebook_update": "ema",
}
TRANSFORMER = {"layers": 2, "hidden": 32, "heads": 2, "mlp_hidden": 48}


def launcher(ranks: int = 2) -> list[str]:
    """DeepSpeed's launcher on a port of its own: another training on the machine is not met."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = str(Path(sys.executable).with_name("deepspeed"))
    return [program, "--num_gpus", str(ranks), "--master_port", str(port)]


def on_two_ranks(worker: Path, *words: object) -> str:
    """Run a worker program to its end as two ranks; what they said.

    Without DeepSpeed's launcher, whose two processes take longer to start than the ranks.
    """
    command = [sys.executable, str(worker), *map(str, words)]
    codes, outs, errors = run_ranks(command, 2)
    said = "".join(outs + errors)
    assert codes == [0, 0], said[-6000:]
    return said


def training(max_steps: int, precision: str = "fp32") -> dict[str, Any]:
    return {
        "max_steps": max_steps,
        "precision": precision,
        "log_every": 1,
        "validate_every": 4,
        "validation_images": 16,
        "sample_every": 0,
    }


def vqvae_run(folder: Path, max_steps: int, **changes: Any) -> dict[str, Any]:
    return {
        "phase": 2,
        "name": "tiny-phase2",
        "runs_folder": str(folder / "runs"),
        **COMMON,
        "training": training(max_steps),
        "optimizer": {"learning_rate": 2e-3},
        "vqvae": VQVAE,
        **changes,
    }


def transformer_run(folder: Path, max_steps: int, **changes: Any) -> dict[str, Any]:
    return {
        "phase": 3,
        "name": "tiny-phase3",
        "runs_folder": str(folder / "runs"),
        **COMMON,
        "training": training(max_steps),
        "optimizer": {"learning_rate": 2e-3},
        "vqvae": {"source": "custom", "checkpoint": str(folder / "vqvae")},
        "text": {"encoder": "random"},
        "latent_cache": str(folder / "latents"),
        "transformer": TRANSFORMER,
        **changes,
    }


def write(path: Path, config: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path
