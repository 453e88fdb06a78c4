"""Prompt to picture with a whole, tiny model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import VQVAE_CONFIG, write_model_folder
from PIL import Image
from safetensors.torch import load_file
from tiny_clip import write_tiny_clip

from lgpt import TextToImagePipeline
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.models import cpu_library
from lgpt.models.clip_encoder import ClipTextEncoder, make_random_clip_text_encoder
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.sampling.pipeline import _encoded_alone


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


def test_each_picture_can_have_a_seed_of_its_own(pipeline: TextToImagePipeline) -> None:
    prompts = ["a red circle", "a blue square"]
    pictures = pipeline(prompts, images_per_prompt=2, seed=[9, 3, 7, 9])
    wanted = [(0, 9), (0, 3), (1, 7), (1, 9)]
    alone = [pipeline(prompts[place], seed=seed)[0] for place, seed in wanted]
    assert all(_same(a, b) for a, b in zip(pictures, alone))
    first, second = pipeline.unconditional(2, seed=[8, 2])
    assert _same(first, pipeline.unconditional(1, seed=8)[0])
    assert _same(second, pipeline.unconditional(1, seed=2)[0])
    for several in ([np.int64(9), np.int64(3)], np.array([9, 3]), torch.tensor([9, 3])):
        assert _same(pipeline("a red circle", images_per_prompt=2, seed=several)[1], pictures[1])
    with pytest.raises(SettingsError, match="3 seeds for 4 pictures"):
        pipeline(prompts, images_per_prompt=2, seed=[1, 2, 3])
    for wrong in ("12", [1.5, 2.5], [True, False], [[1, 2]], [1, "b"]):
        with pytest.raises(SettingsError, match="must be a whole number or several"):
            pipeline(prompts, seed=wrong)


def test_prompts_are_encoded_and_pictures_decoded_one_by_one(
    pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch their last bits would depend on each other."""
    encoded, decoded = [], []
    encode, decode = pipeline.text_encoder.encode, pipeline.vqvae.decode

    def noted_encode(prompts: list[str]) -> Any:
        encoded.append(prompts)
        return encode(prompts)

    def noted_decode(tokens: torch.Tensor) -> torch.Tensor:
        decoded.append(len(tokens))
        return decode(tokens)

    monkeypatch.setattr(pipeline.text_encoder, "encode", noted_encode)
    monkeypatch.setattr(pipeline.vqvae, "decode", noted_decode)
    pipeline(["a red circle", "a blue square"], images_per_prompt=3)
    assert encoded == [["a red circle"], ["a blue square"]]
    assert decoded == [1] * 6


def test_more_pictures_than_one_batch_are_the_same_pictures(
    pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline("a red circle", images_per_prompt=3)
    monkeypatch.setattr("lgpt.sampling.pipeline._BATCH_PICTURES", 2)
    for one, other in zip(whole, pipeline("a red circle", images_per_prompt=3)):
        assert _same(one, other)


def test_folder_s_own_sampling_numbers_are_the_default(pipeline: TextToImagePipeline) -> None:
    schedule = {"guidance_schedule": "constant", "guidance_power": 1.0}
    own = {"guidance": 3.0, "temperature": 1.0, "top_k": 9, "top_p": 1.0, **schedule}
    assert pipeline.sampling == own
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


def test_a_schedule_of_the_caller_s_drops_the_folder_s_power(folder: Path) -> None:
    pipeline = TextToImagePipeline.from_pretrained(folder, device="cpu")
    pipeline.sampling.update(guidance_schedule="cosine", guidance_power=2.5, guidance=9.0)
    own, constant = pipeline("a red circle"), pipeline("a red circle", guidance_schedule="constant")
    assert not _same(own[0], constant[0])
    pipeline.sampling.update(guidance_schedule="constant", guidance_power=1.0)
    assert _same(pipeline("a red circle")[0], constant[0])


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "int8"])
def test_pictures_are_the_same_in_any_batch_to_the_last_bit(folder: Path, dtype: str) -> None:
    pipeline = TextToImagePipeline.from_pretrained(folder, device="cpu", dtype=dtype)
    prompts = ["a red circle", "a blue square", "red red blue a red circle"]
    together = pipeline(prompts, images_per_prompt=5, seed=3)
    weights = pipeline.model.state_dict()["head.weight"]
    # 8-bit weights are saved as what they stand for.
    assert weights.dtype == {"bf16": torch.bfloat16}.get(dtype, torch.float32)
    alone = [pipeline(p, seed=3 + j)[0] for p in prompts for j in range(5)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together))


def test_a_prompt_is_encoded_to_the_same_bits_beside_any_other(tmp_path: Path) -> None:
    words = ["a red circle on a blue square"]
    folder = make_random_clip_text_encoder(tmp_path / "text_encoder", words, width=512)
    encoder = ClipTextEncoder.from_pretrained(folder)
    prompts = ["a red circle", "a blue square on a red circle on a circle", "red red blue"] * 5
    text, mask = _encoded_alone(encoder, prompts)
    for prompt, row, seen in zip(prompts, text, mask):
        alone, its_mask = encoder.encode([prompt])
        length = its_mask.shape[1]
        assert torch.equal(row[:length], alone[0])
        assert seen.tolist() == [True] * length + [False] * (len(seen) - length)
        assert row[length:].eq(0).all()


def test_only_known_dtypes_are_taken(folder: Path) -> None:
    with pytest.raises(SettingsError, match="'fp8' is unknown; allowed: auto, bf16, fp32, int8"):
        TextToImagePipeline.from_pretrained(folder, dtype="fp8")


def test_8_bit_weights_are_refused_where_nothing_multiplies_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="int8 draws on CPUs alone, and this is cuda"):
        TextToImagePipeline.from_pretrained(folder, device="cuda", dtype="int8")
    monkeypatch.setattr(cpu_library, "cpu_library", lambda: None)
    with pytest.raises(SettingsError, match=r"int8 needs a C\+\+ compiler .* even widths"):
        TextToImagePipeline.from_pretrained(folder, device="cpu", dtype="int8")


def test_a_packed_model_is_saved_as_it_was_read(folder: Path, tmp_path: Path) -> None:
    pipeline = TextToImagePipeline.from_pretrained(folder, device="cpu", dtype="fp32")
    pipeline.model.save_pretrained(tmp_path)
    saved, read = (load_file(f / "model.safetensors") for f in (tmp_path, folder))
    assert saved.keys() == read.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in read.items())


def test_half_a_picture_is_completed(pipeline: TextToImagePipeline) -> None:
    numbers = np.random.default_rng(0)
    picture = Image.fromarray(numbers.integers(256, size=(24, 32, 3), dtype=np.uint8))
    given = pipeline.beginning_of(picture, 0.5)
    square = picture.resize((8, 8), Image.Resampling.BICUBIC, box=(4, 0, 28, 24))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1
    whole = pipeline.vqvae.encode(pixels.unsqueeze(0))[0]
    assert torch.equal(given, whole[:2].flatten())
    drawn: list[torch.Tensor] = []
    decode = pipeline.vqvae.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.vqvae, "decode", lambda t: (drawn.append(t), decode(t))[1])
        pipeline(["a red circle", "a blue square"], given=given, seed=1)
        pipeline.unconditional(2, given=given)
    tokens = torch.cat(drawn)
    assert torch.equal(tokens[:, :2], whole[:2].expand(4, -1, -1))
    assert not torch.equal(tokens[0, 2:], tokens[1, 2:])


def test_a_share_that_keeps_nothing_or_everything_is_refused(
    pipeline: TextToImagePipeline,
) -> None:
    for keep, rows in ((0.1, 0), (0.9, 4), (-1.0, -4)):
        with pytest.raises(SettingsError, match=rf"keep {keep} is {rows} of 4 .* 0\.25 to 0\.75"):
            pipeline.beginning_of(Image.new("RGB", (8, 8)), keep)


def test_previews_show_the_rows_that_are_done_on_white(pipeline: TextToImagePipeline) -> None:
    shown: list[list[Image.Image]] = []
    final = pipeline(["a red circle", "a blue square"], preview=shown.append)
    assert len(shown) == 3
    for rows, pictures in enumerate(shown, start=1):
        assert [p.size for p in pictures] == [(8, 8)] * 2
        below = np.asarray(pictures[0])[2 * rows :]
        assert below.size > 0
        assert (below == 255).all()
        assert not (np.asarray(pictures[0])[: 2 * rows] == 255).all()
    # The decoder looks below a row too, so only the same rows alone are the same.
    assert [p.size for p in final] == [(8, 8)] * 2


def test_the_best_pictures_of_a_prompt_come_first(
    pipeline: TextToImagePipeline, tmp_path: Path
) -> None:
    write_tiny_clip(tmp_path)
    scorer = pipeline.open_scorer(str(tmp_path))
    prompts = ["a red circle", "a blue square"]
    everything = pipeline(prompts, images_per_prompt=4)
    chosen = pipeline(prompts, images_per_prompt=4, best=2, scorer=scorer)
    scores = scorer.score(everything, [p for p in prompts for _ in range(4)]).view(2, 4)
    wanted = scores.topk(2, dim=1)
    for number, picture in enumerate(chosen):
        prompt, place = divmod(number, 2)
        assert _same(picture, everything[4 * prompt + int(wanted.indices[prompt, place])])
        assert picture.info["clip_score"] == pytest.approx(float(wanted.values[prompt, place]))
    with pytest.raises(SettingsError, match=r"between 1 and images_per_prompt \(4\), got 5"):
        pipeline(prompts, images_per_prompt=4, best=5)
    with pytest.raises(CheckpointError, match="without an image tower"):
        pipeline(prompts, images_per_prompt=4, best=1)
