"""LPIPS in the loss of phase 2: its gradient arrives, alone and beside a discriminator."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from lgpt.core.distributed import seed_everything
from lgpt.core.errors import SettingsError
from lgpt.models.perceptual import Lpips
from lgpt.settings.run import load_run_settings
from lgpt.training.train_vqvae import VqvaeTask

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("weights")
    seed_everything(5)
    state = Lpips().state_dict()
    features = {name: value for name, value in state.items() if name.startswith("features")}
    torch.save(features, folder / "vgg16.pth")
    linear = {name: value.abs() for name, value in state.items() if name.startswith("lin")}
    torch.save(linear, folder / "vgg.pth")
    return [f"loss.vgg16_weights={folder}/vgg16.pth", f"loss.lpips_weights={folder}/vgg.pth"]


def task_of(folder: Path, *overrides: str) -> VqvaeTask:
    settings = tiny.vqvae_run(folder, 4, vqvae={**tiny.VQVAE, "codebook_update": "gradient"})
    path = tiny.write(folder / "run.yaml", settings)
    run = load_run_settings(path, ["loss.perceptual=lpips", *overrides], environ={})
    seed_everything(run.seed)
    task = VqvaeTask(run, CPU)
    task.engine = SimpleNamespace(module=task.model)
    return task


@pytest.mark.parametrize(
    "adversarial",
    [[], ["loss.adversarial=hinge", "discriminator.start_step=3", "discriminator.warmup_steps=0",
          "discriminator.layers=1", "discriminator.channels=16"]],
)  # fmt: skip
def test_the_loss_is_pixels_plus_weighted_lpips(tmp_path, files, adversarial):
    task = task_of(tmp_path, *files, "loss.perceptual_weight=0.7", *adversarial)
    images = task._training_images(np.arange(2))
    loss, _, parts = task._vqvae_loss(images, task.model(images), step=0)
    parameters = list(task.model.parameters())
    got = torch.autograd.grad(loss, parameters)
    output = task.model(images)
    pixels = functional.l1_loss(output.reconstruction, images)
    lpips = task.perceptual(output.reconstruction, images).mean()
    assert parts["perceptual_loss"].item() == pytest.approx(lpips.item(), rel=1e-5)
    latent_loss = output.codebook_loss + 0.25 * output.commitment_loss
    wanted = torch.autograd.grad(pixels + 0.7 * lpips + latent_loss, parameters, retain_graph=True)
    for mine, reference in zip(got, wanted):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-6)
    without = torch.autograd.grad(pixels + latent_loss, task.model.decoder.conv_out.weight)[0]
    last = [name for name, _ in task.model.named_parameters()].index("decoder.conv_out.weight")
    assert (got[last] - without).norm() > 0.01 * without.norm(), "LPIPS would not be missed"


def test_missing_weights_stop_the_run_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SettingsError, match=r"vgg16-397923af\.pth.*loss\.perceptual: none"):
        task_of(tmp_path)
