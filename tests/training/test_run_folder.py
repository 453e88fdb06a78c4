"""What a run folder holds first thing can be run again, from anywhere and on other ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import yaml

from lgpt.core.errors import SettingsError
from lgpt.evaluation.report import run_report
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.phases import RunSettings
from lgpt.settings.run import load_run_settings
from lgpt.training.train import _is_done, _write_run_folder

OWN = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}


def run_with_own_json(folder: Path) -> RunSettings:
    (folder / "my.json").write_text(json.dumps(OWN))
    config = folder / "a.yaml"
    config.write_text(yaml.safe_dump(tiny.vqvae_run(folder, 4, deepspeed="my.json")))
    return load_run_settings(config, environ={})


def test_a_run_with_its_own_deepspeed_json_runs_again_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    run = run_with_own_json(tmp_path / "here")
    assert run.deepspeed_config == str(tmp_path / "here" / "my.json")
    _write_run_folder(run, resolve_deepspeed_config(run, 2))
    moved = Path(shutil.move(run.run_folder, tmp_path / "moved"))
    shutil.rmtree(tmp_path / "here")
    monkeypatch.chdir(moved.parent)
    for ranks in (1, 2, 4):
        again = load_run_settings("moved/config.yaml", environ={}, world_size=ranks)
        steps = resolve_deepspeed_config(again, ranks)["gradient_accumulation_steps"]
        assert steps * ranks == 4
    assert again == run.model_copy(update={"deepspeed": "moved/ds_source.json"})
    _write_run_folder(again.model_copy(update={"runs_folder": moved.parent, "name": "moved"}), {})
    assert json.loads((moved / "ds_source.json").read_text()) == OWN
    assert load_run_settings(moved, environ={}).deepspeed == f"{moved}/ds_source.json"


def test_a_shipped_deepspeed_config_stays_a_name(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(tiny.vqvae_run(tmp_path, 4, deepspeed="zero3_bf16")))
    run = load_run_settings(config, environ={})
    _write_run_folder(run, {})
    assert sorted(path.name for path in run.run_folder.iterdir()) == [
        "config.yaml",
        "ds_config.json",
    ]
    assert load_run_settings(run.run_folder, environ={}) == run


def test_a_run_can_be_reported_when_its_deepspeed_json_is_gone(tmp_path):
    run = run_with_own_json(tmp_path)
    _write_run_folder(run, {})
    (run.run_folder / "ds_source.json").unlink()
    with pytest.raises(SettingsError, match=r"no DeepSpeed config 'ds_source\.json'"):
        load_run_settings(run.run_folder, environ={})
    assert run_report(run.run_folder)["name"] == run.name


def test_a_run_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    run = run_with_own_json(tmp_path).model_copy(update={"runs_folder": tmp_path / "file"})
    assert not _is_done(run)
    with pytest.raises(SettingsError, match=r"file/tiny-phase2 cannot be written .*runs_folder="):
        _write_run_folder(run, {})
    assert not _is_done(run.model_copy(update={"runs_folder": Path("x" * 300)}))
