"""A whole CLIP with random weights, small enough to be made where it is needed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from lgpt.models.clip_encoder import make_random_clip_text_encoder

WORDS = ["a red circle", "a blue square", "red red blue"]


def write_tiny_clip(folder: Path) -> CLIPModel:
    """A whole CLIP with random weights, written by transformers itself."""
    make_random_clip_text_encoder(folder, WORDS, width=32)  # for its tokenizer
    text = json.loads((folder / "config.json").read_text())
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower["num_attention_heads"] = 2
    config = CLIPConfig(
        text_config={**tower, **{name: text[name] for name in names}},
        vision_config={**tower, "image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model
