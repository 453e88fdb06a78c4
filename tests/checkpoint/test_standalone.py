"""One folder that is a text-to-image model, wherever it is carried."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_export import edited_copy
from typer.testing import CliRunner

from lgpt.checkpoint.export import convert_run
from lgpt.checkpoint.standalone import export_model
from lgpt.cli import app
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.core.files import sha256_of_file
from lgpt.models import clip_encoder
from lgpt.models.clip_encoder import ClipTextEncoder
from lgpt.sampling.pipeline import TextToImagePipeline

pytestmark = pytest.mark.slow
HUB_NAME = "openai/clip-vit-base-patch32"


@pytest.fixture
def named(saves, tmp_path, monkeypatch) -> Path:
    """A checkpoint whose text encoder is named by the hub, while a hub is in reach."""
    local = saves.folder / "text_encoder"
    real = clip_encoder.clip_folder

    def reachable(name: str) -> Path:
        return local if name == HUB_NAME else real(name)

    monkeypatch.setattr(clip_encoder, "clip_folder", reachable)
    digest = ClipTextEncoder.from_pretrained(local).digest
    encoder = {"name": HUB_NAME, "is_random": False, "digest": digest}
    return edited_copy(saves.folder / "runs" / "phase3", tmp_path, text_encoder=encoder)


def test_a_model_that_named_its_text_encoder_draws_offline_after_export(
    named, tmp_path, monkeypatch
):
    model = convert_run(named, tmp_path / "model").folder
    assert json.loads((model / "pipeline.json").read_text())["text_encoder"] == HUB_NAME
    before = TextToImagePipeline.from_pretrained(model, device="cpu")(["a red circle"], seed=1)
    done = CliRunner().invoke(app, ["export", str(model), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    carried = tmp_path / "elsewhere" / "model"
    carried.parent.mkdir()
    (tmp_path / "out").rename(carried)
    shutil.rmtree(model)
    monkeypatch.undo()  # the hub is out of reach from here on
    pipeline = TextToImagePipeline.from_pretrained(carried, device="cpu")
    after = pipeline(["a red circle"], seed=1)
    assert np.array_equal(np.asarray(before[0]), np.asarray(after[0]))
    recorded = json.loads((carried / "export.json").read_text())["sha256"]
    card = (carried / "README.md").read_text()
    assert "text_encoder/model.safetensors" in recorded
    for name, digest in recorded.items():
        assert sha256_of_file(carried / name) == digest, name
        assert card.count(f"{digest}  {name}\n") == 1, name


def test_a_checkpoint_is_exported_at_once_and_a_reference_stays_one(named, tmp_path):
    export_model(named, tmp_path / "copied")
    assert (tmp_path / "copied" / "text_encoder" / "model.safetensors").is_file()
    export_model(named, tmp_path / "referred", copy_text_encoder=False)
    parts = json.loads((tmp_path / "referred" / "pipeline.json").read_text())
    assert parts["text_encoder"] == HUB_NAME
    assert not (tmp_path / "referred" / "text_encoder").exists()


def test_another_encoder_under_the_same_name_is_not_copied(named, tmp_path):
    model = convert_run(named, tmp_path / "model").folder
    parts = json.loads((model / "pipeline.json").read_text())
    parts["text_encoder_digest"] = "0123456789abcdef"
    (model / "pipeline.json").write_text(json.dumps(parts))
    with pytest.raises(CheckpointError, match=r"pipeline\.json changed or gone"):
        export_model(model, tmp_path / "out")
    provenance = json.loads((model / "export.json").read_text())
    provenance["sha256"]["pipeline.json"] = sha256_of_file(model / "pipeline.json")
    (model / "export.json").write_text(json.dumps(provenance))
    with pytest.raises(CheckpointError, match=r"has changed .*0123456789ab then, [0-9a-f]{12} now"):
        export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_told(saves, named, tmp_path):
    vqvae = convert_run(saves.folder / "runs" / "phase2", tmp_path / "vqvae").folder
    with pytest.raises(CheckpointError, match=r"no text-to-image model \(pipeline.json is missing"):
        export_model(vqvae, tmp_path / "out")
    model = convert_run(named, tmp_path / "model").folder
    with pytest.raises(SettingsError, match=r"already: --dtype, --tag and --ema are for"):
        export_model(model, tmp_path / "out", dtype="bf16")
    (model / "export.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"export\.json is damaged"):
        export_model(model, tmp_path / "out")
    with pytest.raises(SettingsError, match="--text-encoder 'link' is unknown; allowed: copy"):
        raise (
            CliRunner()
            .invoke(app, ["export", str(model), str(tmp_path / "out"), "--text-encoder", "link"])
            .exception
        )
