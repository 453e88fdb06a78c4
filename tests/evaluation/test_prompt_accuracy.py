"""Prompt accuracy: exact on drawings, and a model folder is drawn from, scored and annotated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lgpt.core.errors import DataError
from lgpt.data.shapes import draw, held_out_prompts, seen_prompts
from lgpt.evaluation.prompt_accuracy import accuracy_table, evaluate_model, score_pictures
from lgpt.models.clip_encoder import make_random_clip_text_encoder
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig


def test_true_drawings_score_one_and_a_wrong_background_costs_only_that():
    scenes = [scene for _, scene in held_out_prompts(12, objects=2)]
    right = score_pictures([draw(s, 32) for s in scenes], scenes)
    assert right == {
        **dict.fromkeys(("all", "colour", "shape", "size", "position", "background"), 1.0),
        "pictures": 12,
    }
    black = [replace(s, background="black") for s in scenes]
    share_black = sum(s.background == "black" for s in scenes) / 12
    wrong = score_pictures([draw(s, 32) for s in black], scenes)
    assert wrong["all"] == wrong["background"] == pytest.approx(share_black)
    assert wrong["colour"] == wrong["shape"] == 1.0


def test_unequal_numbers_of_pictures_and_scenes_are_refused():
    scenes = [scene for _, scene in seen_prompts(2)]
    with pytest.raises(DataError, match="1 pictures and 2 scenes"):
        score_pictures([draw(scenes[0], 32)], scenes)


@pytest.fixture
def untrained_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    vqvae = VQVAE(
        VQVAEConfig(
            codebook_size=8,
            code_dim=4,
            z_channels=4,
            ch=32,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            attn_resolutions=(),
            resolution=16,
        )
    )
    vqvae.save_pretrained(folder / "vqvae")
    captions = [caption for caption, _ in held_out_prompts(8)]
    make_random_clip_text_encoder(folder / "text_encoder", captions, width=32, layers=1)
    config = LatentGPTConfig(8, 4, 4, text_width=32, layers=1, hidden=32, heads=2)
    LatentGPT(config).save_pretrained(folder)
    parts = {"vqvae": "vqvae", "text_encoder": "text_encoder", "sampling": {"guidance": 3.0}}
    (folder / "pipeline.json").write_text(json.dumps(parts))
    return folder


def test_a_model_folder_is_scored_and_keeps_its_result(untrained_model: Path):
    result = evaluate_model(untrained_model, count=5, seed=1)
    assert result["guidance"] == 3.0
    counts = {name: shares["pictures"] for name, shares in result["prompt_accuracy"].items()}
    assert list(counts.values()) == [5, 3, 3]
    assert json.loads((untrained_model / "evaluation.json").read_text()) == result
    assert evaluate_model(untrained_model, count=5, seed=1) == result
    assert accuracy_table(result).row_count == 3
    assert evaluate_model(untrained_model, count=1, guidance=1.5)["guidance"] == 1.5
