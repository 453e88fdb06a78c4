"""Whole model folders, tiny and with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

import torch

from lgpt import LatentGPT
from lgpt.models.clip_encoder import make_random_clip_text_encoder
from lgpt.models.latent_gpt import LatentGPTConfig
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig

VQVAE_CONFIG = VQVAEConfig(16, 8, z_channels=32, ch=32, ch_mult=(1, 1), num_res_blocks=1)


def write_model_folder(folder: Path, text_width: Optional[int]) -> Path:
    torch.manual_seed(0)
    model = LatentGPT(LatentGPTConfig(16, 4, 4, text_width, layers=1, hidden=16, heads=2))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    vqvae = VQVAE(VQVAE_CONFIG)
    vqvae.quantize.embedding.weight.data.normal_(std=20)  # other tokens, another picture
    vqvae.save_pretrained(folder / "vqvae")
    parts: dict = {"vqvae": "vqvae", "text_encoder": None, "sampling": {"guidance": 1.0}}
    if text_width is not None:
        captions = ["a red circle", "a blue square"]
        make_random_clip_text_encoder(folder / "text_encoder", captions, width=text_width)
        parts = {**parts, "text_encoder": "text_encoder", "sampling": {"guidance": 3.0, "top_k": 9}}
    (folder / "pipeline.json").write_text(json.dumps(parts))
    return folder
