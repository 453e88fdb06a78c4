"""What is made of a checkpoint with an average: the average, bit for bit, unless told otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from two_rank_saves import CASES

from lgpt.checkpoint.average_files import average_file, has_average, read_average
from lgpt.checkpoint.convert import merged_weights
from lgpt.checkpoint.export import convert_run
from lgpt.checkpoint.standalone import export_model
from lgpt.checkpoint.warm_start import load_first_weights
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.evaluation.vqvae_evaluation import open_vqvae
from lgpt.models.latent_gpt import LatentGPT
from lgpt.models.vqgan_import import load_vqvae
from lgpt.models.vqvae import VQVAE
from lgpt.settings.run import load_run_settings
from lgpt.training.train_vqvae import VqvaeTask
from lgpt.training.vqvae_validation import VqvaeValidation

pytestmark = pytest.mark.slow

STEPS, DECAY = 4, 0.3  # the warm-up ends in between: 2/11, 3/12, then 0.3


def averaged_by_hand(run_folder: Path, first: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torch's own average over the masters of every step; integers as they are at the end."""
    average = {name: tensor.clone() for name, tensor in first.items()}
    for step in range(1, STEPS + 1):
        folder = run_folder / "checkpoints" / f"step_{step}" / "model"
        masters = merged_weights(folder)
        names = [name for name in masters if masters[name].is_floating_point()]
        decay = min(DECAY, (1 + step) / (10 + step))
        torch_average = get_ema_multi_avg_fn(decay)
        torch_average([average[name] for name in names], [masters[name] for name in names], None)
    return {**masters, **{name: average[name] for name in names}}


@pytest.mark.parametrize("case", CASES)
def test_merged_averages_equal_the_live_ones_exactly(saves, case):
    live = torch.load(saves.folder / "averaged" / case / "live.pt", weights_only=True)
    folder = saves.folder / "averaged" / case / "checkpoints" / "step_2" / "model"
    merged, masters = merged_weights(folder, of_average=True), merged_weights(folder)
    assert merged.keys() == live.keys() == masters.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, live[name]), name
    own = {"frozen.weight", "frozen.bias", "running_mean", "calls"}
    assert {name for name in merged if torch.equal(merged[name], masters[name])} == own


@pytest.fixture(scope="module")
def runs(ranks, folder) -> dict[str, Path]:
    """Both trainers from known first weights, every step saved."""
    tiny_models.vqvae(seed=8).save_pretrained(folder / "first_vqvae")
    changes = {
        "training": {"max_steps": STEPS, "ema_decay": DECAY},
        "checkpoint": {"every_steps": 1, "keep_every": 1},
    }
    vqvae = tiny_runs.write_run(
        folder,
        "averaged-vqvae",
        "vqvae",
        deepspeed="zero2_bf16",
        init_from=str(folder / "first_vqvae"),
        **changes,
    )
    transformer = tiny_runs.write_run(
        folder,
        "averaged-transformer",
        "transformer",
        deepspeed="zero3_bf16",
        init_from=str(folder / "first_transformer"),
        training={**changes["training"], "precision": "bf16"},
        checkpoint=changes["checkpoint"],
    )
    config = tiny_models.transformer_config()
    fields = {**config.to_dict(), "text_width": None, "dropout": 0.1, "zero_head": False}
    torch.manual_seed(8)
    LatentGPT(type(config).from_dict(fields)).save_pretrained(folder / "first_transformer")
    for run in (vqvae, transformer):
        outcome = ranks.train(run)
        assert outcome.codes == [0, 0], outcome.log[-3000:]
    return {name: folder / "runs" / f"averaged-{name}" for name in ("vqvae", "transformer")}


def test_a_phase_2_run_hands_on_its_average(runs, folder, tmp_path):
    run_folder = runs["vqvae"]
    first = VQVAE.from_pretrained(folder / "first_vqvae").state_dict()
    expected = averaged_by_hand(run_folder, first)
    last = merged_weights(run_folder / "checkpoints" / f"step_{STEPS}" / "model")
    # The codebook is a buffer, an average already: it is the last step's.
    kept = {name for name in last if name.startswith("quantize.")}
    expected.update({name: last[name] for name in kept})
    handed_on = load_vqvae("custom", str(run_folder)).state_dict()
    assert all(torch.equal(handed_on[name], expected[name]) for name in handed_on)
    assert not torch.equal(handed_on["encoder.conv_in.weight"], last["encoder.conv_in.weight"])
    provenance = json.loads((run_folder / "model" / "export.json").read_text())
    assert provenance["weights"] == "average"
    assert "moving average over the steps" in (run_folder / "model" / "README.md").read_text()

    raw = convert_run(run_folder, tmp_path / "raw", ema=False).folder
    stored = load_file(raw / "model.safetensors")
    assert all(torch.equal(stored[name], last[name]) for name in stored)
    assert json.loads((raw / "export.json").read_text())["weights"] == "last"
    assert "weights: those of the step itself" in (raw / "README.md").read_text()


def test_validation_is_of_what_is_handed_on(runs):
    run_folder = runs["vqvae"]
    run = load_run_settings(run_folder, environ={})
    task = VqvaeTask(run, torch.device("cpu"))
    losses = {}
    for name, of_average in (("average", True), ("last", False)):
        engine_folder = run_folder / "checkpoints" / f"step_{STEPS}" / "model"
        task.model.load_state_dict(merged_weights(engine_folder, of_average=of_average))
        model = task.model.eval()
        validation = VqvaeValidation(run, task.val_images, torch.device("cpu"))
        figures, _ = validation.scores_of(
            lambda images, model=model: (model(images).reconstruction, model(images).tokens)
        )
        losses[name] = figures["recon_loss"]
    done = json.loads((run_folder / "DONE").read_text())
    assert done["validated_weights"] == "average"
    assert done["val_recon_loss"] == pytest.approx(losses["average"], rel=1e-5)
    assert losses["last"] != pytest.approx(losses["average"], rel=1e-3)
    facts = json.loads((run_folder / "checkpoints" / f"step_{STEPS}" / "manifest.json").read_text())
    assert facts["facts"]["validation"]["weights"] == "average"


def test_evaluation_of_a_checkpoint_takes_what_is_handed_on(runs):
    step = runs["vqvae"] / "checkpoints" / f"step_{STEPS}"
    vqvae, told = open_vqvae(str(step), None, None)
    handed_on = load_vqvae("custom", str(runs["vqvae"]))
    assert vqvae.weights_digest() == handed_on.weights_digest()
    assert told["source_told_by"] == "a checkpoint of lgpt, step 4, the average of the weights"


def test_a_transformers_average_is_converted_and_proven_by_its_own_logits(runs, folder, tmp_path):
    run_folder = runs["transformer"]
    first = LatentGPT.from_pretrained(folder / "first_transformer").state_dict()
    expected = averaged_by_hand(run_folder, first)
    export = convert_run(run_folder, tmp_path / "model", verify=True)
    stored = LatentGPT.from_pretrained(export.folder).state_dict()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    raw = convert_run(run_folder, tmp_path / "raw", verify=True, ema=False)
    assert (export.is_average, raw.is_average) == (True, False)
    assert export.logits_check.largest_difference < 0.02 * export.logits_check.largest_logit
    assert raw.logits_check.largest_difference < 0.02 * raw.logits_check.largest_logit
    kept = run_folder / "checkpoints" / f"step_{STEPS}"
    files = (kept / f"{name}.safetensors" for name in ("logits", "logits_of_average"))
    logits, of_average = (load_file(file)["logits"] for file in files)
    assert not torch.equal(logits, of_average)
    with pytest.raises(SettingsError, match="--ema are for checkpoints"):
        export_model(export.folder, tmp_path / "standalone", ema=True)
    standalone = tmp_path / "from_run"
    export_model(run_folder, standalone, ema=False)
    assert json.loads((standalone / "export.json").read_text())["weights"] == "last"


def test_another_run_starts_on_the_average_and_says_so(runs, caplog):
    run_folder = runs["vqvae"]
    described = json.loads((run_folder / "model_config.json").read_text())
    model = VQVAE.from_pretrained(run_folder / "model")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for source, kind in ((run_folder, "checkpoint"), (run_folder / "model", "model_folder")):
        for parameter in model.parameters():
            parameter.data.zero_()
        with caplog.at_level("INFO"):
            _, report = load_first_weights(model, source, described)
        assert (report.kind, report.weights) == (kind, "average")
        assert all(torch.equal(expected[n], t) for n, t in model.state_dict().items())
    assert "the moving average of its weights: all" in caplog.text


def test_codes_that_restart_do_so_in_the_average_too(ranks, folder):
    config = tiny_runs.write_run(
        folder,
        "restarts",
        "vqvae",
        deepspeed="zero2_bf16",
        vqvae={"codebook_update": "gradient", "codebook_size": 64},
        schedule={"warmup_steps": 1},
        health={"codebook_window_tokens": 256, "least_codebook_usage": 0.9},  # 2 steps
        training={"max_steps": 6, "ema_decay": 0.9},
        checkpoint={"every_steps": 1, "keep_every": 1},
    )
    outcome = ranks.train(config)
    assert outcome.codes == [0, 0], outcome.log[-3000:]
    metrics = (folder / "runs" / "restarts" / "metrics.jsonl").read_text().splitlines()
    restarted = {
        line["step"]: int(line["restarted_codes"])
        for line in map(json.loads, metrics)
        if "restarted_codes" in line
    }
    assert restarted
    for step, count in restarted.items():
        before, after, average = (
            merged_weights(
                folder / "runs" / "restarts" / "checkpoints" / f"step_{at}" / "model",
                of_average=of_average,
            )["quantize.embedding.weight"]
            for at, of_average in ((step - 1, False), (step, False), (step, True))
        )
        jumped = (after - before).abs().amax(dim=1) > 0.02  # ten times the learning rate
        assert int(jumped.sum()) == count
        assert torch.equal(average[jumped], after[jumped])


def test_an_average_that_is_not_there_is_told(saves, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no moving average .* leave out --ema"):
        convert_run(saves.folder / "runs" / "phase2", tmp_path / "model", ema=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("case", ["zero2_fp32", "zero3_fp32"])
def test_an_average_that_does_not_fit_is_told(saves, tmp_path, case):
    source = saves.folder / "averaged" / case / "checkpoints" / "step_2" / "model"
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    path = average_file(folder, 1)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "vectors": content["vectors"][:1]}, path)
    with pytest.raises(CheckpointError, match=r"average of rank 1 .* holds .* elements"):
        merged_weights(folder, of_average=True)
    torch.save({**content, "format": 9}, path)
    with pytest.raises(CheckpointError, match="has format 9, this version reads 1"):
        read_average(folder, 1)
    torch.save({"updates": 3}, path)
    with pytest.raises(CheckpointError, match=r"holds no average: .*decay"):
        read_average(folder, 1)
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        merged_weights(folder, of_average=True)
    assert has_average(folder)
