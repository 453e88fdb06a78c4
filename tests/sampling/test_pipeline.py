"""Prompt to picture with a whole, tiny model folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lgpt import LatentGPT, TextToImagePipeline
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.models.clip_encoder import make_random_clip_text_encoder
from lgpt.models.latent_gpt import LatentGPTConfig
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.sampling.picture_grid import picture_grid
from lgpt.sampling.pipeline import draw_to_file, prompts_from

VQVAE_CONFIG = VQVAEConfig(16, 8, z_channels=32, ch=32, ch_mult=(1, 1), num_res_blocks=1)


def _write_model_folder(folder: Path, text_width: int | None) -> Path:
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_model_folder(tmp_path_factory.mktemp("model"), text_width=32)


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
    pipeline = TextToImagePipeline.from_pretrained(_write_model_folder(tmp_path, None))
    assert len(pipeline.unconditional(1)) == 1
    with pytest.raises(SettingsError, match=r"is unconditional.*--unconditional"):
        pipeline("a red circle")


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pipeline\.json is missing.*lgpt convert"):
        TextToImagePipeline.from_pretrained(tmp_path)
    _write_model_folder(tmp_path, text_width=32)
    make_random_clip_text_encoder(tmp_path / "text_encoder", ["a"], width=64)
    with pytest.raises(CheckpointError, match="width 64, the transformer was trained with 32"):
        TextToImagePipeline.from_pretrained(tmp_path)("a")
    VQVAE(VQVAEConfig.from_dict({**VQVAE_CONFIG.to_dict(), "codebook_size": 17})).save_pretrained(
        tmp_path / "vqvae"
    )
    with pytest.raises(CheckpointError, match="writes 16 codes, the VQ-VAE has 17"):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_drawing_to_a_grid_or_a_folder(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lgpt"):
        draw_to_file(folder, ["a red circle", "a blue square"], tmp_path / "deep" / "grid.png")
        draw_to_file(folder, ["a red circle"], tmp_path / "many", images_per_prompt=2)
        draw_to_file(folder, [], tmp_path / "free.png", unconditional=3)
    with Image.open(tmp_path / "deep" / "grid.png") as grid:
        assert grid.width > 2 * 128
    assert [p.name for p in sorted((tmp_path / "many").iterdir())] == [
        "0000.png",
        "0001.png",
        "captions.tsv",
    ]
    assert "0001.png\ta red circle" in (tmp_path / "many" / "captions.tsv").read_text()
    assert (tmp_path / "free.png").is_file()
    assert f"Wrote 2 pictures to {tmp_path / 'many'}." in caplog.text


def test_prompts_of_a_command_line(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert prompts_from(["a fox"], lines, 0) == ["a fox", "a cat", "a dog"]
    assert prompts_from([], None, 4) == []
    with pytest.raises(SettingsError, match="nothing to draw"):
        prompts_from([], None, 0)
    with pytest.raises(SettingsError, match=r"--unconditional 4 .* but 1 prompts"):
        prompts_from(["a fox"], None, 4)
    with pytest.raises(SettingsError, match=r"nowhere\.txt does not exist"):
        prompts_from([], tmp_path / "nowhere.txt", 0)
    lines.write_bytes(b"a caf\xe9")
    with pytest.raises(SettingsError, match=r"prompts\.txt cannot be read .*text in UTF-8"):
        prompts_from([], lines, 0)


def test_a_place_that_cannot_be_written_is_found_before_drawing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextToImagePipeline, "unconditional", lambda *_: pytest.fail("it drew"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for out in ("file", "file/grid.png", "folder.png", "x" * 300):
        with pytest.raises(SettingsError, match=f"--out .*{out} cannot be written"):
            draw_to_file(folder, [], tmp_path / out, unconditional=1)


def test_grid_enlarges_small_pictures_pixel_by_pixel_and_writes_captions() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pictures = [Image.new("RGB", (32, 32), colour) for colour in colours]
    pictures[0].putpixel((0, 0), (0, 0, 0))
    bare = np.asarray(picture_grid(pictures))
    for colour in colours[1:]:
        assert (bare == colour).all(axis=2).sum() == 128 * 128
    assert (bare == colours[0]).all(axis=2).sum() == 128 * 128 - 16, "one pixel became 4 x 4"
    long = "a very long caption that does not fit under a picture, with 猫 in it"
    captioned = picture_grid(pictures, [long, "b", ""], columns=3)
    assert captioned.width == 3 * (128 + 8) + 8
    assert captioned.height > bare.shape[0] // 2 + 14
    below = np.asarray(captioned)[8 + 128 :, : 8 + 128]
    assert (below < 128).any(), "the caption is written under its picture"
    with pytest.raises(ValueError, match="2 captions for 3 pictures"):
        picture_grid(pictures, ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        picture_grid([])


def test_large_pictures_keep_their_size() -> None:
    assert picture_grid([Image.new("RGB", (200, 150))]).size == (200 + 16, 150 + 16)
