"""Prompt to picture with a whole, tiny model folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_folders import VQVAE_CONFIG, write_model_folder
from PIL import Image

from lgpt import TextToImagePipeline
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.models.clip_encoder import make_random_clip_text_encoder
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"), text_width=32)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder, device="cpu")


def _same(first: Image.Image, second: Image.Image) -> bool:
    a, b = (np.asarray(image).astype(int) for image in (first, second))
    return a.shape == b.shape and int(abs(a - b).max()) <= 1  # 1: rounding at .5


def test_prompts_become_pictures_in_order(pipeline: TextToImagePipeline) -> None:
    pictures = pipeline(["a red circle", "a blue square"], images_per_prompt=2, seed=4)
    assert [(p.size, p.mode) for p in pictures] == [((8, 8), "RGB")] * 4
    assert _same(pictures[0], pipeline("a red circle", seed=4)[0])
    assert _same(pictures[3], pipeline("a blue square", seed=5)[0])
    assert not _same(pictures[0], pictures[1])


def test_more_pictures_than_one_batch_are_the_same_pictures(
    pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline("a red circle", images_per_prompt=3)
    monkeypatch.setattr("lgpt.sampling.pipeline._BATCH_PICTURES", 2)
    for one, other in zip(whole, pipeline("a red circle", images_per_prompt=3)):
        assert _same(one, other)


def test_folder_s_own_sampling_numbers_are_the_default(pipeline: TextToImagePipeline) -> None:
    assert pipeline.sampling == {"guidance": 3.0, "temperature": 1.0, "top_k": 9, "top_p": 1.0}
    spelled_out = pipeline("a red circle", guidance=3.0, temperature=1.0, top_k=9, top_p=1.0)[0]
    assert _same(pipeline("a red circle")[0], spelled_out)
    assert not _same(pipeline("a red circle", guidance=0.0)[0], spelled_out)


def test_unconditional_pictures_come_from_a_conditional_model_too(
    pipeline: TextToImagePipeline,
) -> None:
    first, second = pipeline.unconditional(2, seed=7)
    assert _same(first, pipeline("a red circle", guidance=0.0, seed=7)[0])
    assert _same(second, pipeline.unconditional(1, seed=8)[0])


def test_unconditional_model_says_that_it_takes_no_prompts(tmp_path: Path) -> None:
    pipeline = TextToImagePipeline.from_pretrained(write_model_folder(tmp_path, None))
    assert len(pipeline.unconditional(1)) == 1
    with pytest.raises(SettingsError, match=r"is unconditional.*--unconditional"):
        pipeline("a red circle")


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pipeline\.json is missing.*lgpt convert"):
        TextToImagePipeline.from_pretrained(tmp_path)
    write_model_folder(tmp_path, text_width=32)
    make_random_clip_text_encoder(tmp_path / "text_encoder", ["a"], width=64)
    with pytest.raises(CheckpointError, match="width 64, the transformer was trained with 32"):
        TextToImagePipeline.from_pretrained(tmp_path)("a")
    VQVAE(VQVAEConfig.from_dict({**VQVAE_CONFIG.to_dict(), "codebook_size": 17})).save_pretrained(
        tmp_path / "vqvae"
    )
    with pytest.raises(CheckpointError, match="writes 16 codes, the VQ-VAE has 17"):
        TextToImagePipeline.from_pretrained(tmp_path)
