"""Sums over pictures against plain numpy; what fills a batch up does not count; nothing waits."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lgpt.evaluation.picture_metrics import ssim
from lgpt.evaluation.reconstruction_scores import ReconstructionScores

CODES = 20


def some_pictures(count: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    images = torch.rand(count, 3, side, side) * 2 - 1
    back = images + 0.3 * torch.randn_like(images) * torch.rand(count, 1, 1, 1)
    return images, back, torch.randint(0, CODES - 5, (count, 2, 2))


def scored(batches: list[torch.Tensor], counted: list[torch.Tensor]) -> dict[str, float]:
    images, back, tokens = some_pictures(7)
    scores = ReconstructionScores(CODES, torch.device("cpu"), loss="l2")
    for batch, is_counted in zip(batches, counted):
        scores.add(images[batch], back[batch], tokens[batch], is_counted)
    return scores.over_ranks()


def test_scores_are_means_over_pictures_and_codes_of_all_tokens():
    images, back, tokens = some_pictures(7)
    got = scored([torch.arange(7)], [torch.ones(7, dtype=torch.bool)])
    error, shown = (back - images).numpy(), (back.clamp(-1, 1) - images).numpy()
    assert got["recon_loss"] == pytest.approx((error**2).mean(), rel=1e-5)
    decibels = 10 * np.log10(4 / (shown**2).mean(axis=(1, 2, 3)))
    assert got["psnr_db"] == pytest.approx(decibels.mean(), rel=1e-5)
    assert got["ssim"] == pytest.approx(float(ssim(back, images).mean()), rel=1e-6)
    counts = np.bincount(tokens.numpy().ravel(), minlength=CODES)
    assert got["codebook_usage"] == np.count_nonzero(counts) / CODES
    assert got["dead_codes"] == CODES - np.count_nonzero(counts) > 4
    assert got["perplexity"] == pytest.approx(np.exp(scipy.stats.entropy(counts)))


def test_uneven_batches_and_what_fills_them_up_change_nothing():
    yes = torch.ones(7, dtype=torch.bool)
    whole = scored([torch.arange(7)], [yes])
    split = scored(
        [torch.tensor([0, 1, 2, 3, 4]), torch.tensor([5, 6, 0, 0, 3]), torch.tensor([2, 2, 2])],
        [yes[:5], torch.tensor([True, True, False, False, False]), ~yes[:3]],
    )
    assert split == pytest.approx(whole, rel=1e-6)


def test_pictures_smaller_than_the_window_have_no_ssim():
    images, back, tokens = some_pictures(3, side=8)
    scores = ReconstructionScores(CODES, torch.device("cpu"), loss="l1")
    scores.add(images, back, tokens, torch.ones(3, dtype=torch.bool))
    assert "ssim" not in scores.over_ranks()


def test_a_picture_that_is_not_finite_but_only_fills_up_does_no_harm():
    images, back, tokens = some_pictures(3)
    back[2] = torch.nan
    scores = ReconstructionScores(CODES, torch.device("cpu"), loss="l1")
    values = scores.add(images, back, tokens, torch.tensor([True, True, False]))
    assert torch.isnan(values["recon_loss"][2])
    assert np.isfinite(list(scores.over_ranks().values())).all()


class Calls(TorchDispatchMode):
    """Names of the operations that make Python wait for the device."""

    waits = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        is_mask = name == "index" and any(i.dtype == torch.bool for i in args[1] if i is not None)
        if is_mask or name.startswith(self.waits):
            self.waited.append(name)
        return function(*args, **(kwargs or {}))


def test_a_batch_is_counted_without_waiting_for_the_device():
    images, back, tokens = some_pictures(4)
    scores = ReconstructionScores(CODES, torch.device("cpu"), loss="l1")
    with Calls() as calls:
        scores.add(images, back, tokens, torch.tensor([True, True, True, False]))
    assert calls.waited == []
    with Calls() as calls:
        float(images.sum())
        torch.bincount(tokens.flatten())
        images[images > 0]
    assert len(calls.waited) == 3, "the detector sees what it is for"
