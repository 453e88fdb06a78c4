"""What only ranks can get wrong, in one launch of two: late ones, time budgets, stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from test_vqvae_validation import one_by_one

WORKER = Path(__file__).with_name("two_ranks.py")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """What each rank saw."""
    tiny.on_two_ranks(WORKER, folder)
    return [json.loads((folder / f"results_{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_meet_when_one_comes_late_to_a_random_text_encoder(results):
    first, second = (result["encoder"] for result in results)
    assert first["digest"] == second["digest"]
    assert (first["sum"], second["sum"]) == (3.0, 3.0)
    for refusal in (first["refusal"], second["refusal"]):
        assert "text_encoder is missing; run `lgpt prepare` first" in refusal


def test_a_stopped_and_resumed_run_repeats_the_losses_of_one_that_was_not(results, folder):
    for result in results:
        straight, stopped, _, resumed = result["stop"]["endings"]
        assert (straight, resumed) == ("done", "done")
        assert stopped.startswith("StoppedEarly: Stopped by")
        assert "after step 3 of 6" in stopped
    expected, got = (steps_of(folder / "runs" / name) for name in ("straight", "stopped"))
    assert [metrics["step"] for metrics in got] == [1, 2, 3, 4, 5, 6]
    assert got == expected
    assert len({metrics["recon_loss"] for metrics in got}) == 6
    # The discriminator too: from step 2 on, with other numbers at every step.
    assert len({metrics.get("discriminator_loss") for metrics in got}) == 6
    assert ["adversarial_weight" in metrics for metrics in got] == [False] * 2 + [True] * 4


def steps_of(run_folder: Path) -> list[dict[str, float]]:
    """Losses, weights and gradient norms of every step that was logged."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    parts = ("step", "loss", "weight", "norm", "logits")
    return [
        {
            name: value
            for name, value in line.items()
            if name.startswith("logits") or name.endswith(parts)
        }
        for line in lines
        if "recon_loss" in line
    ]


def test_a_refused_start_leaves_the_run_folder_as_it_was(results):
    for result in results:
        assert "ZeRO-2 in fp32" in result["stop"]["endings"][2]
        assert result["stop"]["untouched"]


def test_a_time_budget_ends_all_ranks_at_the_same_step(results, folder):
    first, second = (result["budget"] for result in results)
    assert first["ending"] == second["ending"] == "done"
    assert first["steps"] == second["steps"]
    assert 1 < first["steps"] < 1000
    done = json.loads((folder / "runs" / "budget" / "DONE").read_text())
    assert done["step"] == first["steps"]


def test_all_ranks_compute_bf16_the_way_rank_0_measured(results):
    assert [result["float32_products"] for result in results] == [True, True]


def test_two_ranks_validate_as_one_picture_at_a_time(results, folder):
    """To 1e-5 of a figure, or 1e-6: what float32 leaves where pictures meet in other batches."""
    first, second = (result["validation"] for result in results)
    assert first == second
    assert len(first) == 6
    for case, figures in first.items():
        images = int(case.split()[1])
        expected = one_by_one(folder / "validation_0.yaml", images)
        assert figures == pytest.approx(expected, rel=1e-5, abs=1e-6), case


def test_a_network_that_one_rank_lacks_is_used_by_none(results):
    assert [result["judges"] for result in results] == [[False, False]] * 2


def test_features_that_ranks_share_are_as_far_apart_as_on_one(results):
    means, covariances = [], []
    for seed in (0, 1):
        rows = torch.randn(31, 5, generator=torch.Generator().manual_seed(seed)).double().numpy()
        means.append(rows.mean(0))
        covariances.append(np.cov(rows, rowvar=False))
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    wanted = np.sum((means[0] - means[1]) ** 2) + np.trace(sum(covariances) - 2 * root)
    assert [result["features"] for result in results] == pytest.approx([wanted] * 2, rel=1e-9)
