"""Scores of a whole CLIP against transformers' own model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import WORDS, write_tiny_clip
from transformers import CLIPModel, CLIPTokenizerFast

from lgpt.core.errors import CheckpointError
from lgpt.models.clip_encoder import make_random_clip_text_encoder
from lgpt.models.clip_scorer import ClipScorer


def _pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    numbers = np.random.default_rng(0)
    return [
        Image.fromarray(numbers.integers(256, size=(height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIPModel]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, write_tiny_clip(folder)


def test_scores_are_those_of_transformers(tiny: tuple[Path, CLIPModel]) -> None:
    folder, model = tiny
    pictures = _pictures((16, 16), (16, 16), (16, 16))
    tokens = CLIPTokenizerFast.from_pretrained(folder)(WORDS, padding=True, return_tensors="pt")
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    pixels = torch.stack(
        [(torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 - mean) / std for p in pictures]
    )
    with torch.no_grad():
        theirs = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=pixels,
        )
    expected = (theirs.logits_per_image / model.logit_scale.exp()).diagonal()
    scorer = ClipScorer.from_pretrained(folder)
    torch.testing.assert_close(scorer.score(pictures, WORDS), expected, atol=1e-5, rtol=0)
    assert scorer.score([], []).tolist() == []
    with pytest.raises(ValueError, match="1 captions for 3 pictures"):
        scorer.score(pictures, ["a"])


def test_a_picture_is_seen_as_by_clip_s_own_preprocessing(tiny: tuple[Path, CLIPModel]) -> None:
    scorer = ClipScorer.from_pretrained(tiny[0])
    wide, square = _pictures((48, 32), (64, 64))
    shrunk = wide.resize((24, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16))
    assert torch.equal(scorer.score([wide], WORDS[:1]), scorer.score([shrunk], WORDS[:1]))
    shrunk = square.resize((16, 16), Image.Resampling.BICUBIC)
    assert torch.equal(scorer.score([square], WORDS[:1]), scorer.score([shrunk], WORDS[:1]))


def test_a_clip_without_an_image_tower_or_with_wrong_weights_is_refused(
    tiny: tuple[Path, CLIPModel], tmp_path: Path
) -> None:
    make_random_clip_text_encoder(tmp_path / "text", WORDS, width=32)
    with pytest.raises(CheckpointError, match=r"without an image tower.*clip-vit-base-patch32"):
        ClipScorer.from_pretrained(tmp_path / "text")
    shutil.copytree(tiny[0], tmp_path / "half")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    removed = weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "half" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"first visual_projection\.weight is missing"):
        ClipScorer.from_pretrained(tmp_path / "half")
    weights["visual_projection.weight"] = removed[:5].contiguous()
    save_file(weights, tmp_path / "half" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is \[5, 32\] instead of \[24, 32\]"):
        ClipScorer.from_pretrained(tmp_path / "half")
    (tmp_path / "half" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ClipScorer.from_pretrained(tmp_path / "half")
