"""The smallest runs of both trainers that still validate, draw, save and prune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import yaml

_COMMON: dict[str, Any] = {
    "data": {
        "dataset": "shapes",
        "resolution": 8,
        "workers": 0,
        "shapes": {"train_images": 20, "val_images": 4},
    },
    "batch": {"global_batch_images": 8, "micro_batch_images": 2},
    "schedule": {"warmup_steps": 2},
    "optimizer": {"learning_rate": 2e-3},
    "tracking": {"enabled": False},
}

# Of a VQ-VAE for many steps: ZeRO-3 takes its time for each module.
FEW_MODULES: dict[str, Any] = {"num_res_blocks": 0, "attn_resolutions": []}


def write_run(folder: Path, name: str, trains: str, **changes: Any) -> Path:
    """A config file.

    Args:
        folder: Gets `<name>.yaml`; the run folder is `<folder>/runs/<name>`.
        trains: vqvae, or transformer (unconditional, encoding on the fly).
        changes: Sections, merged into the tiny run's.
    """
    config: dict[str, Any] = {
        **_COMMON,
        "name": name,
        "runs_folder": str(folder / "runs"),
        "training": {"log_every": 1, "validation_images": 4, "validate_every": 0}
        | {"sample_every": 0, "max_steps": 8, "precision": "fp32"},
    }
    if trains == "vqvae":
        # Dropout draws from every rank's own generator.
        vqvae = {**tiny_models.VQVAE_SETTINGS, "dropout": 0.1}
        config.update(phase=2, vqvae=vqvae)
    else:
        if not (folder / "vqvae").exists():
            tiny_models.vqvae(seed=5).save_pretrained(folder / "vqvae")
        config.update(
            phase=3,
            conditioning="unconditional",
            vqvae={"source": "custom", "checkpoint": str(folder / "vqvae")},
            transformer={**tiny_models.TRANSFORMER_SETTINGS, "dropout": 0.1},
        )
        config["sampling"] = {"images": 2}
    for section, values in changes.items():
        is_section = isinstance(values, dict)
        config[section] = {**config.get(section, {}), **values} if is_section else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
