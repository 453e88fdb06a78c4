"""First weights of a run: what was named is what is loaded, and what does not fit is told."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from lgpt.checkpoint.convert import merged_weights
from lgpt.checkpoint.export import convert_run
from lgpt.checkpoint.warm_start import load_first_weights
from lgpt.core.errors import CheckpointError
from lgpt.models.latent_gpt import LatentGPT

pytestmark = pytest.mark.slow


@pytest.fixture
def description(saves) -> dict[str, Any]:
    """What a run like the saved one says of its model."""
    path = saves.folder / "runs" / "phase3" / "model_config.json"
    return dict(json.loads(path.read_text()))


def fresh(**changes: Any) -> LatentGPT:
    torch.manual_seed(99)
    return LatentGPT(replace(tiny_models.transformer_config(), **changes))


def test_a_zero3_run_starts_on_the_step_that_was_named_and_not_on_the_latest(saves):
    """DeepSpeed 0.19.8 loads `latest` for it. Of ZeRO-2's shards, into ZeRO-3 in bf16."""
    folder = saves.folder / "zero2_bf16" / "checkpoints"
    assert (folder / "latest").read_text().strip() == "step_5"
    started = torch.load(saves.folder / "warm.pt", weights_only=True)
    named = torch.load(saves.folder / "zero2_bf16" / "live.pt", weights_only=True)
    latest = merged_weights(folder / "step_5" / "model")
    assert started.keys() == named.keys()
    for name, tensor in named.items():
        assert torch.equal(started[name], tensor), name
    assert not torch.equal(started["first.weight"], latest["first.weight"])
    assert started["calls"].item() == 3


def test_every_tensor_comes_and_the_report_tells_from_where(saves, description):
    run_folder = saves.folder / "runs" / "phase3"
    model = fresh()
    weights, report = load_first_weights(model, run_folder, description)
    expected = tiny_models.transformer().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
        # ZeRO-3 in bf16 made its masters of rounded weights.
        assert torch.equal(tensor, expected[name].bfloat16().float()), name
    assert report.source == str(run_folder / "checkpoints" / "step_7" / "model")
    assert (report.kind, report.step, report.tensors) == ("checkpoint", 7, len(expected))
    assert report.elements == sum(tensor.numel() for tensor in expected.values())
    assert (report.differences, report.is_same_vqvae) == ({}, True)


def test_a_model_folder_goes_back_into_a_run(saves, description, tmp_path, caplog):
    folder = convert_run(saves.folder / "runs" / "phase3", tmp_path / "model").folder
    model = fresh(dropout=0.5)
    there = {**description, "config": {**description["config"], "dropout": 0.5}}
    there["vqvae"] = {**description["vqvae"], "digest": "of another"}
    with caplog.at_level(logging.INFO):
        _, report = load_first_weights(model, folder, there)
    stored = LatentGPT.from_pretrained(folder).state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    assert (report.kind, report.step) == ("model_folder", None)
    assert report.differences == {"dropout": [0.0, 0.5]}
    assert report.is_same_vqvae is False
    assert "dropout was 0.0 there and is 0.5 here" in caplog.text
    assert "trained on tokens of another VQ-VAE" in caplog.text


@pytest.mark.parametrize("has_shapes_only", [True, False])
def test_a_bf16_model_folder_does_not_make_a_float32_run_train_in_bf16(
    saves, description, tmp_path, has_shapes_only
):
    folder = convert_run(saves.folder / "runs" / "phase3", tmp_path / "model", dtype="bf16").folder
    with torch.device("meta" if has_shapes_only else "cpu"):
        model = fresh()
    weights, _ = load_first_weights(model, folder, description)
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == weights[name].dtype == torch.float32, name
        assert torch.equal(tensor, stored[name].float()), name
        assert torch.equal(tensor, weights[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_another_vocabulary_is_named_with_its_tensors(saves, description):
    model = fresh(codebook_size=20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    here = {**description, "config": {**description["config"], "codebook_size": 20}}
    with pytest.raises(
        CheckpointError,
        match=r"token_embedding\.weight is \[16, 16\], the config asks for \[20, 16\].*"
        r"differ in: codebook_size 16 there, 20 here",
    ):
        load_first_weights(model, saves.folder / "runs" / "phase3", here)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_missing_layer_is_named(saves, description):
    here = {**description, "config": {**description["config"], "layers": 2}}
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\..*layers 1 there, 2 here"):
        load_first_weights(fresh(layers=2), saves.folder / "runs" / "phase3", here)


def test_what_holds_nothing_fitting_is_told(saves, description, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds a vqvae, this run trains a latent_gpt"):
        load_first_weights(fresh(), saves.folder / "runs" / "phase2", description)
    with pytest.raises(CheckpointError, match=r"init_from: .* holds no whole checkpoint"):
        load_first_weights(fresh(), tmp_path, description)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="describes no model of lgpt"):
        load_first_weights(fresh(), tmp_path, description)
    source = saves.folder / "runs" / "phase3" / "checkpoints" / "step_7"
    copy = Path(shutil.copytree(source, tmp_path / "step_7"))
    next((copy / "model").glob("*rank_1*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"step_7 is damaged: .*is missing"):
        load_first_weights(fresh(), copy, description)
