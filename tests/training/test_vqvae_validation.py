"""Validation of phase 2 against one picture at a time in plain PyTorch.

The same on two ranks is in test_two_ranks.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from lgpt.core.distributed import seed_everything
from lgpt.data.transforms import to_unit_range
from lgpt.evaluation.picture_metrics import code_perplexity, psnr_decibels, ssim
from lgpt.settings.phases import Phase2
from lgpt.settings.run import load_run_settings
from lgpt.training.train_vqvae import VqvaeTask

# A prime, so that some batches of every micro batch and number of ranks are not full.
IMAGES = 13


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    return tiny.write(folder / "run.yaml", tiny.vqvae_run(folder, 4))


def task_of(config: Path, *overrides: str) -> VqvaeTask:
    run = load_run_settings(config, overrides, environ={})
    assert isinstance(run, Phase2)
    seed_everything(run.seed)
    task = VqvaeTask(run, torch.device("cpu"))
    task.model.eval()
    return task


@torch.no_grad()
def one_by_one(config: Path, images: int) -> dict[str, float]:
    """The figures by the obvious way: a picture a call, then plain means and counts."""
    task = task_of(config)
    values: dict[str, list[float]] = {"recon_loss": [], "psnr_db": [], "ssim": []}
    counts = np.zeros(task.run.vqvae.codebook_size, np.int64)
    for item in range(images):
        pixels = task.val_images.items(np.array([item]), np.array([0]))
        picture = to_unit_range(torch.from_numpy(pixels))
        output = task.model(picture)
        values["recon_loss"].append(float((output.reconstruction - picture).abs().mean()))
        values["psnr_db"].append(float(psnr_decibels(output.reconstruction, picture)))
        values["ssim"].append(float(ssim(output.reconstruction, picture)))
        counts += np.bincount(output.tokens.numpy().ravel(), minlength=len(counts))
    return {
        **{name: float(np.mean(of_name)) for name, of_name in values.items()},
        "codebook_usage": float(np.mean(counts > 0)),
        "perplexity": code_perplexity(torch.from_numpy(counts)),
        "dead_codes": float(np.sum(counts == 0)),
    }


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_one_rank_counts_every_picture_once_whatever_the_micro_batch(config, micro_batch):
    task = task_of(
        config,
        f"batch.micro_batch_images={micro_batch}",
        f"training.validation_images={IMAGES}",
    )
    sizes = []

    def reconstruct(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(images))
        output = task.model(images)
        return output.reconstruction, output.tokens

    figures, counts = task.validation.scores_of(reconstruct)
    assert int(counts.sum()) == IMAGES * task.tokens_per_image
    assert figures == pytest.approx(one_by_one(config, IMAGES), rel=1e-5, abs=1e-6)
    assert sizes == [-(-IMAGES // len(sizes))] * len(sizes)
    assert sizes[0] <= micro_batch


def test_more_pictures_than_there_are_means_all_of_them(config):
    task = task_of(config, "training.validation_images=1000")
    task.engine = _Bare(task.model)
    assert list(task.draw(0)) == ["reconstructions"]
    assert dict(task.validate()) == pytest.approx(one_by_one(config, 16), rel=1e-5, abs=1e-6)
    assert list(task.draw(0)) == ["reconstructions", "codebook_usage"]
    assert int(task.code_counts.sum()) == 16 * task.tokens_per_image


class _Bare:
    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, images: torch.Tensor) -> object:
        return self.module(images)

    def eval(self) -> None:
        self.module.eval()
