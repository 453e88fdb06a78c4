"""Model folders made from real ZeRO checkpoints of both kinds of run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lgpt.checkpoint.convert import merged_weights
from lgpt.checkpoint.export import convert_run
from lgpt.cli import app
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.models.clip_encoder import make_random_clip_text_encoder
from lgpt.models.latent_gpt import LatentGPT
from lgpt.models.vqgan_import import load_vqvae
from lgpt.models.vqvae import VQVAE
from lgpt.sampling.pipeline import TextToImagePipeline

pytestmark = pytest.mark.slow


@pytest.fixture
def phase3(saves) -> Path:
    run_folder: Path = saves.folder / "runs" / "phase3"
    return run_folder


def edited_copy(run_folder: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a run whose model_config.json says something else, with a manifest that agrees."""
    copy = Path(shutil.copytree(run_folder / "checkpoints" / "step_7", folder / "step_7"))
    path, manifest_path = copy / "model_config.json", copy / "manifest.json"
    described = json.loads(path.read_text())
    for key, value in changes.items():
        described[key] = {**described[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(described))
    manifest = json.loads(manifest_path.read_text())
    content = path.read_bytes()
    manifest["files"]["model_config.json"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    manifest_path.write_text(json.dumps(manifest))
    return copy


def test_a_transformer_run_becomes_a_folder_that_draws(phase3, tmp_path):
    out = tmp_path / "model"
    export = convert_run(phase3, out)
    assert (export.folder, export.kind, export.step) == (out, "latent_gpt", 7)
    masters = merged_weights(phase3 / "checkpoints" / "step_7" / "model")
    model = LatentGPT.from_pretrained(out)
    assert export.num_parameters == model.num_parameters()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, masters[name]), name
    pipeline = TextToImagePipeline.from_pretrained(out, device="cpu")
    (picture,) = pipeline(["a red circle"], seed=1)
    assert picture.size == (8, 8)
    assert json.loads((out / "pipeline.json").read_text()) == {
        "vqvae": "vqvae",
        "vqvae_digest": pipeline.vqvae.weights_digest(),
        "text_encoder": "text_encoder",
        "text_encoder_is_random": True,
        "text_encoder_digest": pipeline.text_encoder.digest,
        "sampling": {
            "guidance": 3.0,
            "guidance_schedule": "constant",
            "guidance_power": 1.0,
            "temperature": 1.0,
            "top_k": 5,
            "top_p": 1.0,
        },
    }


def test_the_card_and_export_json_tell_where_it_came_from(saves, phase3, tmp_path):
    export = convert_run(phase3, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    vqvae = VQVAE.from_pretrained(saves.folder / "vqvae")
    for fact in (
        "The text encoder is RANDOM",
        f"`{saves.folder / 'vqvae'}`, weights digest `{vqvae.weights_digest()}`",
        "trained on: `shapes`, 8x8 pixels",
        "steps: 7 of 8 images (56 images seen)",
        f"parameters: {export.num_parameters:,}, stored as fp32",
        "run: `tiny-phase3`, phase 3",
    ):
        assert fact in card
    provenance = json.loads((tmp_path / "model" / "export.json").read_text())
    assert provenance["checkpoint"] == str(phase3 / "checkpoints" / "step_7")
    assert {"lgpt", "torch", "deepspeed"} == provenance["checkpoint_saved_with"].keys()
    model = tmp_path / "model"
    there = {p.relative_to(model).as_posix(): p for p in model.rglob("*") if p.is_file()}
    there = {name: p for name, p in there.items() if name not in ("README.md", "export.json")}
    assert provenance["sha256"].keys() == there.keys()
    for name, digest in provenance["sha256"].items():
        assert hashlib.sha256(there[name].read_bytes()).hexdigest() == digest
        assert f"{digest}  {name}" in card


def test_a_phase_2_checkpoint_is_evaluated_on_the_pictures_of_its_run(saves, tmp_path):
    step = saves.folder / "runs" / "phase2" / "checkpoints" / "step_7"
    page = tmp_path / "page.html"
    words = ["evaluate", str(step), "--max-images", "3", "--page", str(page), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["source_told_by"] == "a checkpoint of lgpt, step 7"
    assert result["weights_digest"] == tiny_models.vqvae().weights_digest()
    assert (result["images"], result["resolution"], result["tokens"]) == (3, 8, 3 * 16)
    assert (result["data"]["dataset"], result["data"]["split"]) == ("shapes", "val")
    assert page.is_file()


def test_a_phase_2_run_becomes_a_vqvae(saves, tmp_path):
    out = tmp_path / "vqvae"
    export = convert_run(saves.folder / "runs" / "phase2" / "checkpoints" / "step_7", out)
    assert export.kind == "vqvae"
    assert load_vqvae("custom", out).weights_digest() == tiny_models.vqvae().weights_digest()
    assert not (out / "pipeline.json").exists()
    assert "a VQ-VAE" in (out / "README.md").read_text()


def test_bf16_rounds_the_float32_masters_once(phase3, tmp_path):
    convert_run(phase3, tmp_path / "model", dtype="bf16")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    masters = merged_weights(phase3 / "checkpoints" / "step_7" / "model")
    assert stored.keys() == masters.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, masters[name].bfloat16()), name
    assert next(VQVAE.from_pretrained(tmp_path / "model" / "vqvae").parameters()).dtype == (
        torch.float32
    )


def test_an_unknown_dtype_lists_the_known_ones(phase3, tmp_path):
    with pytest.raises(SettingsError, match="dtype 'fp16' is unknown; allowed: fp32, bf16"):
        convert_run(phase3, tmp_path / "model", dtype="fp16")


def test_other_peoples_folders_are_left_alone_and_ours_replaced_only_when_told(phase3, tmp_path):
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").touch()
    with pytest.raises(CheckpointError, match="no export of lgpt"):
        convert_run(phase3, foreign, overwrite=True)
    assert [path.name for path in foreign.iterdir()] == ["cat.jpg"]

    ours = tmp_path / "model"
    ours.mkdir()
    convert_run(phase3, ours)
    with pytest.raises(CheckpointError, match="--overwrite to replace it"):
        convert_run(phase3, ours)
    (ours / "stale").touch()
    convert_run(phase3, ours, overwrite=True)
    assert not (ours / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "photos"]


def test_a_vqvae_that_changed_since_training_is_refused_with_both_digests(phase3, tmp_path):
    copy = edited_copy(phase3, tmp_path, vqvae={"digest": "0123456789abcdef"})
    with pytest.raises(CheckpointError, match=r"digest 0123456789ab then, [0-9a-f]{12} now"):
        convert_run(copy, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["step_7"], "half an export is left"


def test_a_text_encoder_that_changed_since_training_is_refused_with_both_digests(phase3, tmp_path):
    copy = edited_copy(phase3, tmp_path, text_encoder={"digest": "0123456789abcdef"})
    with pytest.raises(CheckpointError, match=r"encoder .*0123456789ab then, [0-9a-f]{12} now"):
        convert_run(copy, tmp_path / "model")


def test_a_random_text_encoder_that_is_gone_is_no_name_of_the_hub(phase3, tmp_path):
    copy = edited_copy(phase3, tmp_path, text_encoder={"name": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError, match=r"random text encoder .*gone .* is gone"):
        convert_run(copy, tmp_path / "model")


def test_a_model_folder_with_another_text_encoder_draws_nothing(phase3, tmp_path):
    out = tmp_path / "model"
    convert_run(phase3, out)
    words = ["another encoder of the same width"]
    make_random_clip_text_encoder(out / "text_encoder", words, width=32, layers=1)
    pipeline = TextToImagePipeline.from_pretrained(out, device="cpu")
    with pytest.raises(CheckpointError, match=r"not the one that .* was trained with \(digest"):
        pipeline(["a red circle"])


def test_a_config_of_another_model_names_what_does_not_fit(phase3, tmp_path):
    copy = edited_copy(phase3, tmp_path, config={"layers": 2})
    with pytest.raises(CheckpointError, match=r"missing .*blocks\.1\."):
        convert_run(copy, tmp_path / "model")


def test_a_text_encoder_from_the_hub_is_named_and_not_copied(phase3, tmp_path):
    encoder = {"name": "openai/clip-vit-base-patch32", "is_random": False, "digest": "0123"}
    copy = edited_copy(phase3, tmp_path, text_encoder=encoder)
    convert_run(copy, tmp_path / "model")
    pipeline = json.loads((tmp_path / "model" / "pipeline.json").read_text())
    assert pipeline["text_encoder"] == "openai/clip-vit-base-patch32"
    assert pipeline["text_encoder_is_random"] is False
    assert pipeline["text_encoder_digest"] == "0123"
    assert not (tmp_path / "model" / "text_encoder").exists()
    assert "RANDOM" not in (tmp_path / "model" / "README.md").read_text()


def test_a_tag_names_one_checkpoint_of_a_run(phase3, tmp_path):
    assert convert_run(phase3, tmp_path / "a", tag="7").step == 7
    assert convert_run(phase3 / "checkpoints", tmp_path / "b", tag="latest").step == 7
    with pytest.raises(CheckpointError, match=r"no checkpoint '8'; there are step_7"):
        convert_run(phase3, tmp_path / "c", tag="8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_model_in_several_files_opens_like_one_in_a_single_file(phase3, tmp_path):
    whole = convert_run(phase3, tmp_path / "whole").folder
    pieces = convert_run(phase3, tmp_path / "pieces", max_shard_bytes=4000).folder
    assert len(list(pieces.glob("model-0*-of-0*.safetensors"))) > 2
    assert not (pieces / "model.safetensors").exists()
    one = LatentGPT.from_pretrained(whole).state_dict()
    other = LatentGPT.from_pretrained(pieces).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    next(pieces.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors is damaged"):
        LatentGPT.from_pretrained(pieces)
    index = pieces / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"head.weight": "../whole/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="no index of weights: it names files elsewhere"):
        LatentGPT.from_pretrained(pieces)


def test_a_disk_that_is_full_or_gets_full_leaves_the_earlier_export(phase3, tmp_path, monkeypatch):
    out = convert_run(phase3, tmp_path / "model").folder
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def convert() -> None:
        convert_run(phase3, out, overwrite=True, dtype="bf16")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match=r"was not written \(.*No space left on device"):
            convert()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=999))
        with pytest.raises(CheckpointError, match=r"weights need [\d,]+ bytes, .* has 999 free"):
            convert()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_damaged_checkpoint_is_not_converted(phase3, tmp_path):
    copy = edited_copy(phase3, tmp_path)
    shard = next((copy / "model").glob("*rank_1*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: .*optim_states\.pt"):
        convert_run(copy, tmp_path / "model")


def test_a_folder_without_checkpoints_says_what_to_give(tmp_path):
    with pytest.raises(CheckpointError, match=r"no whole checkpoint: give a run folder"):
        convert_run(tmp_path, tmp_path / "model")


def test_a_deepspeed_json_that_is_gone_is_not_needed(phase3, tmp_path):
    copy = edited_copy(phase3, tmp_path)
    config, manifest_path = copy / "config.yaml", copy / "manifest.json"
    config.write_text(config.read_text().replace("deepspeed: null", "deepspeed: gone.json"))
    assert "gone.json" in config.read_text()
    manifest = json.loads(manifest_path.read_text())
    content = config.read_bytes()
    manifest["files"]["config.yaml"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    manifest_path.write_text(json.dumps(manifest))
    assert convert_run(copy, tmp_path / "model").step == 7
