"""`lgpt bench vqvae`: what it reports, and that LlamaGen's loop in it is LlamaGen's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lgpt.cli import app
from lgpt.core.errors import LgptError
from lgpt.models.vqvae import VQVAE, VQVAEConfig
from lgpt.training.bench_llamagen import LlamagenLoop
from lgpt.training.bench_recipe import CodeWindow

SMALL = [
    "data.dataset=shapes",
    "data.resolution=16",
    "data.shapes.train_images=24",
    "data.shapes.val_images=18",
    "vqvae.resolution=16",
    "vqvae.codebook_size=32",
]


def bench(*words: Any) -> dict[str, Any]:
    """In a process of its own: it joins a process group, whose environment would stay behind."""
    command = [sys.executable, "-m", "lgpt", "bench", "vqvae", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_both_recipes_are_measured_at_equal_steps_and_at_equal_time():
    result = bench("demo/phase2_openmoji_f8", *SMALL, "--steps", 4, "--measurements", 2)
    ours = result["ours"]
    steps, time = result["llamagen_at_equal_steps"], result["llamagen_at_equal_time"]
    assert ours["steps"] == steps["steps"] == 4
    assert time["seconds"] >= ours["seconds"] > 0
    assert result["gain_at_equal_steps_db"] == pytest.approx(ours["psnr_db"] - steps["psnr_db"])
    assert result["gain_at_equal_time_db"] == pytest.approx(ours["psnr_db"] - time["psnr_db"])
    for name in ("ours", "llamagen"):
        curve = result["curves"][name]
        assert [point["steps"] for point in curve] == [2, 4]
        assert all(0 < point["codebook_usage"] <= 1 for point in curve)
    assert result["validation_images"] == 18
    assert result["curves"]["ours"][0]["psnr_db"] != result["curves"]["ours"][1]["psnr_db"]


def test_only_phase_2_has_a_recipe_to_compare():
    done = CliRunner().invoke(app, ["bench", "vqvae", "demo/phase3_shapes"])
    assert isinstance(done.exception, LgptError)
    assert re.search("Phase 3 trains a transformer.*demo/phase2_openmoji_f8", str(done.exception))


def test_llamagens_loop_walks_the_path_of_our_gradient_codebook():
    """Two quantizers written apart; with the same weights, loss and Adam they must stay equal."""
    config = VQVAEConfig(32, 8, 32, 32, (1, 1), 0, (), 8, l2_normalized_codes=True)
    loop = LlamagenLoop(config, torch.device("cpu"))
    ours = VQVAE(config).train()
    theirs = {k.replace("embedding", "quantize.embedding"): v for k, v in weights(loop.model)}
    ours.load_state_dict(theirs)
    adam = torch.optim.Adam(ours.parameters(), lr=1e-4, betas=(0.9, 0.95))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    for _ in range(3):
        expected = ours(images)
        loss = (expected.reconstruction - images).square().mean()
        loss = loss + expected.codebook_loss + 0.25 * expected.commitment_loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        adam.step()
        got = loop.step(images)
        assert torch.equal(got.tokens, expected.tokens)
        torch.testing.assert_close(got.pictures, expected.reconstruction)
    moved = loop.model.embedding.weight
    torch.testing.assert_close(moved, ours.quantize.embedding.weight)
    assert not torch.equal(moved, theirs["quantize.embedding.weight"])


def weights(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.clone()) for name, tensor in model.state_dict().items()]


def test_a_window_forgets_tokens_as_llamagens_does():
    window = CodeWindow(4)
    assert window.usage() == 0
    window.add(torch.tensor([[[0, 1]]]))
    assert window.usage() == 0.5
    for _ in range(64):
        window.add(torch.from_numpy(np.full((1, 32, 32), 2)))
    assert window.usage() == 0.25
