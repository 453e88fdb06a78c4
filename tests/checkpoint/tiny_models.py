"""A tiny phase 2 run, a phase 3 run on another VQ-VAE, and what lies beside their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lgpt.core.distributed import seed_everything
from lgpt.models.clip_encoder import ClipTextEncoder, make_random_clip_text_encoder
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.settings.run import dump_run_settings, load_run_settings

VQVAE_SETTINGS: dict[str, Any] = {
    "codebook_size": 16,
    "code_dim": 8,
    "z_channels": 32,
    "ch": 32,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "resolution": 8,
    "codebook_update": "ema",
}
TRANSFORMER_SETTINGS: dict[str, Any] = {"layers": 1, "hidden": 16, "heads": 2, "mlp_hidden": 24}
COMMON: dict[str, Any] = {
    "data": {"dataset": "shapes", "resolution": 8},
    "batch": {"global_batch_images": 8, "micro_batch_images": 2},
    "training": {"max_steps": 10, "precision": "fp32"},
    "schedule": {"warmup_steps": 2},
}
TEXT_WIDTH = 32


def vqvae(seed: int = 3) -> VQVAE:
    seed_everything(seed)
    return VQVAE(VQVAEConfig.from_dict(VQVAE_SETTINGS))


def transformer_config() -> LatentGPTConfig:
    return LatentGPTConfig(16, 4, 4, TEXT_WIDTH, **TRANSFORMER_SETTINGS)


def transformer() -> LatentGPT:
    seed_everything(4)
    return LatentGPT(transformer_config())


def write_parts(home: Path) -> None:
    """What phase 3 stands on: a VQ-VAE, a text encoder, and the config files of both runs."""
    vqvae(seed=5).save_pretrained(home / "vqvae")
    make_random_clip_text_encoder(
        home / "text_encoder", ["a red circle", "a blue square"], width=TEXT_WIDTH, layers=1
    )
    encoder = ClipTextEncoder.from_pretrained(home / "text_encoder")
    source = {"source": "custom", "checkpoint": str(home / "vqvae")}
    runs: dict[str, dict[str, Any]] = {
        "phase2": {"phase": 2, "name": "tiny-phase2", **COMMON, "vqvae": VQVAE_SETTINGS},
        "phase3": {
            "phase": 3,
            "name": "tiny-phase3",
            **COMMON,
            "vqvae": source,
            "text": {"encoder": "random"},
            "transformer": TRANSFORMER_SETTINGS,
            "sampling": {"guidance": 3.0, "top_k": 5},
        },
    }
    described: dict[str, dict[str, Any]] = {
        "phase2": {
            "kind": "vqvae",
            "config": vqvae().config.to_dict(),
            "vqvae": None,
            "text_encoder": None,
        },
        "phase3": {
            "kind": "latent_gpt",
            "config": transformer_config().to_dict(),
            "vqvae": {
                **source,
                "ddconfig": None,
                "input_range": "-1..1",
                "digest": VQVAE.from_pretrained(home / "vqvae").weights_digest(),
            },
            "text_encoder": {
                "name": encoder.name,
                "is_random": encoder.is_random,
                "digest": encoder.digest,
            },
        },
    }
    for name, run in runs.items():
        folder = home / "runs" / name
        folder.mkdir(parents=True)
        written = folder / "as_written.yaml"
        written.write_text(yaml.safe_dump(run))
        settings = load_run_settings(written, environ={})
        (folder / "config.yaml").write_text(dump_run_settings(settings))
        (folder / "model_config.json").write_text(json.dumps(described[name]))


def texts_of(home: Path, name: str) -> dict[str, str]:
    folder = home / "runs" / name
    return {file: (folder / file).read_text() for file in ("config.yaml", "model_config.json")}
