"""Phase 2 from a trained VQ-VAE: it starts as that one, and what should not move does not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
import yaml

from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.models.vqgan_import import load_vqvae
from lgpt.models.vqvae import VQVAE
from lgpt.planning.parameters import run_parameters
from lgpt.settings.run import load_run_settings
from lgpt.settings.vqvae import VqvaeSettings
from lgpt.training.train import _load_first_weights
from lgpt.training.train_vqvae import VqvaeTask

FIXTURES = Path(__file__).parents[1] / "fixtures"
SOURCES = {
    "pretrained_hf": FIXTURES / "flax_tiny",  # f=16
    "pretrained_taming": FIXTURES / "taming_f8_tiny",
    "pretrained_llamagen": FIXTURES / "llamagen_vq_tiny",
}
FROZEN = ("encoder.", "quant_conv.", "quantize.")


def vqvae_of(source: str) -> VQVAE:
    return load_vqvae(source, SOURCES[source])


def write(folder: Path, name: str, source: str, trains: str, **changes: Any) -> Path:
    config = vqvae_of(source).config
    own = {"ema_decay", "revive_dead_codes"}  # only with moving averages
    if trains == "decoder":
        own.add("codebook_update")
    vqvae = {k: v for k, v in config.to_dict().items() if k in VqvaeSettings.model_fields}
    path = tiny_runs.write_run(
        folder,
        name,
        "vqvae",
        init_from=str(SOURCES[source]),
        finetuning={"source": source, "trains": trains},
        data={"resolution": 32},
        batch={"global_batch_images": 4, "micro_batch_images": 1},
        **changes,
    )
    values = yaml.safe_load(path.read_text())
    values["vqvae"] = {k: v for k, v in vqvae.items() if k not in own}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("trains", ["all", "decoder"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_run_starts_as_its_source(tmp_path, source, trains):
    run = load_run_settings(write(tmp_path, "run", source, trains), environ={})
    run.run_folder.mkdir(parents=True)
    task = VqvaeTask(run, torch.device("cpu"))
    _load_first_weights(run, task)
    items = np.arange(2)
    images = torch.from_numpy(task.train_images.items(items, items * 0)) / 127.5 - 1
    expected, got = vqvae_of(source), task.model.eval()(images)
    assert torch.equal(got.tokens, expected.encode(images))
    if trains == "decoder":  # checkpoints of such runs must not depend on a setting without effect
        assert task.model.state_dict().keys() == expected.state_dict().keys()
    whole = trains == "all"  # whose codes carry the rounding of the straight-through sum
    pictures = expected(images).reconstruction if whole else expected.decode(got.tokens)
    assert torch.equal(got.reconstruction, pictures)
    told = json.loads((run.run_folder / "warm_start.json").read_text())
    assert (told["kind"], told["source"]) == (source, str(SOURCES[source]))
    assert run_parameters(run) == sum(p.numel() for p in task.model.parameters())


def test_another_architecture_is_told_with_what_to_write(tmp_path):
    path = write(tmp_path, "run", "pretrained_hf", "all")
    run = load_run_settings(path, ["vqvae.ch_mult=[1,1,2,1,2]"], environ={})
    task = VqvaeTask(run, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"set vqvae\.ch_mult=\[1,1,2,1,1\]\."):
        _load_first_weights(run, task)


def test_settings_that_do_nothing_for_a_decoder_are_refused(tmp_path):
    path = write(tmp_path, "run", "pretrained_hf", "decoder")
    with pytest.raises(SettingsError, match=r"loss\.commitment_weight = .* has no effect with"):
        load_run_settings(path, ["loss.commitment_weight=1"], environ={})
    with pytest.raises(SettingsError, match="has no effect without init_from"):
        load_run_settings("phase2_vqvae", ["finetuning.trains=decoder"], environ={})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "deepspeed"), [("pretrained_hf", "zero2_bf16"), ("pretrained_taming", "zero3_bf16")]
)
def test_only_the_decoder_moves_on_two_ranks_in_bf16_and_after_a_resume(
    ranks, folder, source, deepspeed
):
    changes: dict[str, Any] = {
        "deepspeed": deepspeed,
        "schedule": {"warmup_steps": 1},
        "training": {"max_steps": 2, "precision": "bf16", "validate_every": 2},
        "checkpoint": {"every_steps": 2},
    }
    config = write(folder, deepspeed, source, "decoder", **changes)
    begun = ranks.train(config)
    assert begun.codes == [0, 0], begun.log[-3000:]
    run_folder = folder / "runs" / deepspeed
    (run_folder / "DONE").unlink()
    shutil.rmtree(run_folder / "model")
    other = ranks.train(config, "finetuning.trains=all", "training.max_steps=3")
    assert other.codes == [2, 2], other.log[-3000:]
    assert "finetuning.trains is all, but" in other.log
    went_on = ranks.train(config, "training.max_steps=3")
    assert went_on.codes == [0, 0], went_on.log[-3000:]
    assert "Going on from" in went_on.log
    before, after = vqvae_of(source), load_vqvae("custom", run_folder)
    state = after.state_dict()
    for name, tensor in before.state_dict().items():
        is_same = torch.equal(tensor, state[name])
        assert is_same == name.startswith(FROZEN), name
    assert dataclasses.replace(after.config, codebook_update="gradient") == before.config
