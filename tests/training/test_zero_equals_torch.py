"""ZeRO-2, ZeRO-3 and plain PyTorch walk the same path: 20 steps, same seed, same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Union

import numpy as np
import pytest
import tiny
import torch

from lgpt.core.distributed import seed_everything
from lgpt.engine.build import parameter_groups
from lgpt.engine.first_weights import make_first_weights
from lgpt.models.vqvae import VQVAE, VQVAEConfig
from lgpt.settings.phases import Phase2, RunSettings
from lgpt.settings.run import load_run_settings
from lgpt.settings.vqvae import VqvaeSettings
from lgpt.training.encode_latents import prepare_latent_cache
from lgpt.training.losses import reconstruction_loss
from lgpt.training.train_transformer import TransformerTask
from lgpt.training.train_vqvae import VqvaeTask

STEPS = 20
pytestmark = pytest.mark.slow


class PlainEngine:
    """What DeepSpeed does, in plain PyTorch: accumulate, clip by the global norm, AdamW."""

    def __init__(self, module: torch.nn.Module, run: RunSettings, accumulation: int) -> None:
        self.module, self._run, self._accumulation = module, run, accumulation
        optimizer = run.optimizer
        self.optimizer = torch.optim.AdamW(
            parameter_groups(module, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
        )
        self.norms: list[float] = []
        self._micro_steps = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train(self) -> None:
        self.module.train()

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            return
        clip = self._run.optimizer.gradient_clipping
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip)
        self.norms.append(float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("zero")
    seed_everything(1)
    VQVAE(VQVAEConfig.from_settings(VqvaeSettings(**tiny.VQVAE))).save_pretrained(folder / "vqvae")
    few = {**tiny.VQVAE, "num_res_blocks": 0}  # modules: ZeRO-3 takes its time for each
    gradient = {**few, "codebook_update": "gradient"}
    averages = {**few, "codebook_size": 96, "ema_decay": 0.5}  # codes restart now and then
    entropy = {"entropy_weight": 0.05, "entropy_temperature": 1.0}
    configs = {
        "vqvae": tiny.vqvae_run(folder, STEPS, vqvae=gradient),
        "vqvae_averages": tiny.vqvae_run(folder, STEPS, vqvae=averages, loss=entropy),
        "transformer": tiny.transformer_run(folder, STEPS),
    }
    paths = {name: tiny.write(folder / f"{name}.yaml", config) for name, config in configs.items()}
    prepare_latent_cache(load_run_settings(paths["transformer"], environ={}))
    return paths


@pytest.fixture(scope="module")
def zero(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("zero_out") / "losses.json"
    worker = Path(__file__).with_name("zero_worker.py")
    tiny.on_two_ranks(worker, out, *runs.values())
    return json.loads(out.read_text())


def plain_task(run: RunSettings) -> Union[VqvaeTask, TransformerTask]:
    """A task whose model has its first weights, without an engine."""
    if isinstance(run, Phase2):
        return VqvaeTask(run, torch.device("cpu"))
    task = TransformerTask(run, torch.device("cpu"))
    make_first_weights(task.model, {"zero_optimization": {"stage": 2}})
    return task


@pytest.fixture(scope="module")
def plain(runs: dict[str, Path]) -> dict[str, tuple[list[float], list[float]]]:
    paths = {}
    for name, path in runs.items():
        # One process does in one micro batch what 2 ranks do in one each: the same images a step.
        run = load_run_settings(path, ["batch.micro_batch_images=4"], environ={})
        seed_everything(run.seed)
        task = plain_task(run)
        task.engine = PlainEngine(task.model, run, accumulation=2)
        losses = [task.train_step(step)[task.main_loss] for step in range(STEPS)]
        paths[name] = (losses, task.engine.norms)
    return paths


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["vqvae", "vqvae_averages", "transformer"])
def test_float32_losses_and_gradient_norms_agree_step_by_step(zero, plain, name, stage):
    got = zero[f"{name}-zero{stage}-fp32"]
    losses, norms = plain[name]
    assert len(got["losses"]) == STEPS
    np.testing.assert_allclose(got["losses"], losses, rtol=FLOAT32_TOLERANCE[name])
    np.testing.assert_allclose(got["norms"], norms, rtol=100 * FLOAT32_TOLERANCE[name])
    assert np.ptp(losses) > 0.05 * losses[0], "nothing moved, so agreement would prove nothing"
    largest = np.abs(np.array(got["losses"]) / np.array(losses) - 1).max()
    print(f"{name} ZeRO-{stage} fp32: largest relative difference of a loss {largest:.1e}")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["vqvae", "transformer"])
def test_bf16_stays_within_its_noise_of_float32(zero, plain, name, stage):
    got = zero[f"{name}-zero{stage}-bf16"]
    assert got["dtype"] == "torch.bfloat16"
    difference = np.abs(np.array(got["losses"]) / np.array(plain[name][0]) - 1)
    print(f"{name} ZeRO-{stage} bf16: largest relative difference {difference.max():.1e}")
    assert 0 < difference.max() < BF16_NOISE[name], difference


# Relative; about ten times what was seen (printed by the tests, shown by `pytest -rP`).
FLOAT32_TOLERANCE = {"vqvae": 3e-5, "vqvae_averages": 3e-3, "transformer": 1e-5}
BF16_NOISE = {"vqvae": 0.1, "transformer": 0.02}


def test_an_unconditional_run_trains_on_a_cache_that_holds_text(runs):
    run = load_run_settings(runs["transformer"], ["conditioning=unconditional"], environ={})
    seed_everything(run.seed)
    task = plain_task(run)
    task.engine = PlainEngine(task.model, run, accumulation=4)
    first, *_, last = [task.train_step(step)["ce_loss"] for step in range(10)]
    assert last < first


def test_reconstruction_is_what_the_task_minimises(runs):
    """Only the reconstruction reaches the decoder, so its gradient tells what is minimised."""
    run = load_run_settings(runs["vqvae"], ["optimizer.gradient_clipping=1e9"], environ={})
    seed_everything(run.seed)
    task = VqvaeTask(run, torch.device("cpu"))
    task.engine = PlainEngine(task.model, run, accumulation=4)
    got: list[torch.Tensor] = []
    task.engine.optimizer.register_step_pre_hook(
        lambda *_: got.extend(p.grad.clone() for p in task.model.decoder.parameters())
    )
    reported = task.train_step(0)["recon_loss"]
    seed_everything(run.seed)
    fresh = VqvaeTask(run, torch.device("cpu"))
    fresh.engine = PlainEngine(fresh.model, run, accumulation=4)
    images = fresh._training_images(np.arange(run.batch.global_batch_images))
    loss = reconstruction_loss(fresh.model(images).reconstruction, images, "l1")
    assert reported == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.autograd.grad(loss, list(fresh.model.decoder.parameters()))
    for mine, reference in zip(got, expected):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-2
