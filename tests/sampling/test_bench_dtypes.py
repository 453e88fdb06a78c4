"""`lgpt bench dtypes` on tiny model folders: what it counts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from model_folders import write_model_folder
from PIL import Image
from typer.testing import CliRunner

from lgpt import TextToImagePipeline
from lgpt.cli import app
from lgpt.core.errors import SettingsError
from lgpt.models import cpu_library
from lgpt.models.latent_gpt import LatentGPT
from lgpt.sampling.bench_dtypes import likeliest_tokens
from lgpt.sampling.generate import generate_tokens

PROMPTS = ["a red circle", "a blue square", "red red blue"]
SCHEDULE = {"guidance": 4.0, "guidance_schedule": "cosine", "guidance_power": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"), text_width=32)


def bench(folder: Path, out: Path, *words: str, prompts: Optional[list[str]] = None) -> Any:
    asked = [word for prompt in prompts or [] for word in ("--prompt", prompt)]
    command = ["bench", "dtypes", str(folder), "--out", str(out), *asked, *words, "--json"]
    done = CliRunner().invoke(app, command)
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout.splitlines()[-1])


def test_three_dtypes_draw_and_their_tokens_are_compared(folder: Path, tmp_path: Path) -> None:
    result = bench(folder, tmp_path / "new" / "seen.png", "--guidance", "4", prompts=PROMPTS)
    assert (result["pictures"], result["tokens_per_image"], result["guidance"]) == (3, 16, 4)
    measured = result["dtypes"]
    assert list(measured) == ["fp32", "bf16", "int8"]
    tokens, forced = {}, {}
    for dtype in measured:
        pipeline = TextToImagePipeline.from_pretrained(folder, device="cpu", dtype=dtype)
        text, mask = pipeline.text_encoder.encode(PROMPTS)
        tokens[dtype] = generate_tokens(
            pipeline.model, text, mask, seeds=[5, 6, 7], guidance=4.0, top_k=1
        )
        forced[dtype] = _step_by_step(pipeline.model, tokens["fp32"].flatten(1), text, mask)
    for dtype, numbers in measured.items():
        drawn, same = (t[dtype] != t["fp32"] for t in (tokens, forced))
        assert numbers["changed_when_drawn"] == pytest.approx(float(drawn.float().mean()))
        assert numbers["changed_at_same_tokens"] == pytest.approx(float(same.float().mean()))
        assert numbers["tokens_per_second"] > 0
    assert measured["fp32"]["speedup"] == 1
    sizes = [numbers["weight_bytes"] for numbers in measured.values()]
    assert sizes == sorted(sizes, reverse=True)
    with Image.open(tmp_path / "new" / "seen.png") as sheet:
        assert sheet.width > 3 * 128
        assert sheet.height > 3 * 128


def _step_by_step(
    model: LatentGPT, tokens: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """With a cache and a guidance of 4, reading the given tokens whatever it would draw."""
    state = model.start_decoding(text, mask)
    free = model.start_decoding(None, None, max_batch=len(tokens))
    likeliest = []
    for position in range(tokens.shape[1]):
        read = tokens[:, position - 1] if position else None
        with_text, without = model.decode_next(read, state), model.decode_next(read, free)
        likeliest.append((without + 4 * (with_text - without)).argmax(dim=1))
    return torch.stack(likeliest, dim=1)


def test_the_likeliest_after_what_was_drawn_greedily_is_what_was_drawn(folder: Path) -> None:
    pipeline = TextToImagePipeline.from_pretrained(folder, device="cpu", dtype="fp32")
    text = pipeline.text_encoder.encode(PROMPTS[:1])
    drawn = generate_tokens(pipeline.model, *text, seeds=[0], top_k=1, **SCHEDULE).flatten()
    assert torch.equal(likeliest_tokens(pipeline.model, drawn, text, SCHEDULE), drawn)
    constant = {**SCHEDULE, "guidance_schedule": "constant"}
    assert not torch.equal(likeliest_tokens(pipeline.model, drawn, text, constant), drawn)


def test_a_model_without_prompts_draws_its_one_likeliest_picture(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", None)
    assert bench(folder, tmp_path / "seen.png")["pictures"] == 1
    for words in (("--prompt", "a red circle"), ("--guidance", "3")):
        with pytest.raises(SettingsError, match="it takes no prompts and no guidance"):
            bench(folder, tmp_path / "seen.png", *words)


def test_without_a_compiler_the_others_are_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_library, "cpu_library", lambda: None)
    result = bench(folder, tmp_path / "seen.png", prompts=PROMPTS[:1])
    assert list(result["dtypes"]) == ["fp32", "bf16"]
    assert "left out: dtype int8 needs a C++ compiler" in caplog.text


def test_what_cannot_be_compared_is_refused_before_anything_is_drawn(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="nothing to draw: give --prompt or --prompts-file"):
        bench(folder, tmp_path / "seen.png")
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n")
    with pytest.raises(SettingsError, match=r"nothing to draw: give --prompt or --prompts-file\."):
        bench(folder, tmp_path / "seen.png", "--prompts-file", str(empty))
    with pytest.raises(SettingsError, match=r"--out .*seen\.jpg must end in \.png"):
        bench(folder, tmp_path / "seen.jpg", prompts=PROMPTS)
