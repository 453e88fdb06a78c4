"""LPIPS and rFID in the scores, against plain numpy; and what is told where weights are missing."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_file import write_random_inception

from lgpt.core.errors import SettingsError
from lgpt.evaluation.judges import Judges, find_judges
from lgpt.evaluation.reconstruction_scores import ReconstructionScores
from lgpt.models.perceptual import Lpips

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(5)
    state = {k: v.abs() if k.startswith("lin") else v for k, v in Lpips().state_dict().items()}
    for name, kind in (("vgg16", "features"), ("vgg", "lin")):
        torch.save({k: v for k, v in state.items() if k.startswith(kind)}, folder / f"{name}.pth")
    return {
        "vgg16_weights": folder / "vgg16.pth",
        "lpips_weights": folder / "vgg.pth",
        "inception_weights": write_random_inception(folder / "inception.pth"),
    }


@pytest.fixture(scope="module")
def judges(weights: dict[str, Path]) -> Judges:
    return find_judges(CPU, side=16, **weights)


def rfid_by_svd(first: np.ndarray, second: np.ndarray) -> float:
    """With C = A^T A, A centred rows / sqrt(n - 1): tr (C1 C2)^(1/2) is A1 A2^T's nuclear norm."""
    a, b = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (first, second))
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    means = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return float(means + (a**2).sum() + (b**2).sum() - 2 * nuclear)


@pytest.mark.slow
def test_lpips_and_rfid_are_over_counted_pictures_and_originals_are_measured_once(judges):
    torch.manual_seed(1)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    back = (images + 0.5 * torch.randn_like(images)) * 0.8
    back[4] = 3.0
    counted = torch.arange(5) < 4
    seen: list[torch.Tensor] = []
    hook = judges.inception.register_forward_hook(lambda module, given, made: seen.append(made))

    def scores_of(originals):
        scores = ReconstructionScores(4, CPU, loss="l1", judges=judges, originals=originals)
        for part in (slice(0, 3), slice(3, 5)):
            tokens = torch.zeros(len(images[part]), 1, 1, dtype=torch.int64)
            scores.add(images[part], back[part], tokens, counted[part])
        return scores

    first = scores_of(None)
    got = first.over_ranks()
    features = [torch.cat(seen[n::2])[:4].double().numpy() for n in (1, 0)]
    assert got["rfid"] == pytest.approx(rfid_by_svd(*features), rel=1e-5)
    assert got["rfid"] > 0.01
    lpips = judges.lpips(back[:4].clamp(-1, 1), images[:4])
    assert got["lpips"] == pytest.approx(float(lpips.mean()), rel=1e-5)
    second = scores_of(first.originals)
    hook.remove()
    assert second.over_ranks() == pytest.approx(got, rel=1e-9)
    assert [len(output) for output in seen] == [3, 3, 2, 2, 3, 2]


def test_what_is_not_there_is_told_once_with_the_way_to_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert find_judges(CPU, side=64) == (None, None)
    lpips, rfid = (record.getMessage() for record in caplog.records)
    assert lpips.startswith("lpips is not measured: ")
    assert "vgg16-397923af.pth is not there; fetch https://" in lpips
    assert "name the file in loss.vgg16_weights" in lpips
    assert rfid.startswith("rfid is not measured: ")
    assert "name the file in metrics.inception_weights" in rfid
    caplog.clear()
    assert find_judges(CPU, side=64, wants_lpips=False, wants_rfid=False) == (None, None)
    assert not caplog.records


def test_named_weights_that_are_not_there_are_an_error(tmp_path, weights):
    with pytest.raises(SettingsError, match=r"LPIPS cannot be measured: .*none\.pth is not there"):
        find_judges(CPU, side=64, vgg16_weights=tmp_path / "none.pth")
    with pytest.raises(SettingsError, match=r"rFID cannot be measured: .*none\.pth is not there"):
        find_judges(CPU, side=64, wants_lpips=False, inception_weights=tmp_path / "none.pth")


def test_pictures_too_small_for_lpips_are_told(weights, caplog):
    with caplog.at_level(logging.INFO):
        judges = find_judges(CPU, side=8, **weights)
    assert judges.lpips is None
    assert judges.inception is not None
    assert "pictures of 8 pixels a side are too small for it (16)" in caplog.text
