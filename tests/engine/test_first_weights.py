"""Models that begin on the meta device: the same weights as others, and no more held than kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from first_weights_worker import CONFIG, on_meta

from lgpt.engine.first_weights import make_first_weights
from lgpt.models.latent_gpt import LatentGPT

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
import tiny


def plain_weights(seed: int) -> dict[str, torch.Tensor]:
    """Drawn by the model itself, whole and in float32."""
    model = LatentGPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(seed)
    model.apply(model.initialize)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("first_weights")
    worker = Path(__file__).with_name("first_weights_worker.py")
    tiny.on_two_ranks(worker, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_a_model_on_the_meta_device_is_filled_in_float32_with_its_own_values() -> None:
    model = on_meta()
    torch.manual_seed(3)
    make_first_weights(model, {"zero_optimization": {"stage": 2}})
    expected = plain_weights(3)
    assert [name for name, _ in model.named_parameters()] == list(expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert torch.equal(model.rope.cos, LatentGPT(CONFIG).rope.cos)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_rank_begins_with_the_weights_of_rank_zero_at_every_stage(ranks, stage, is_bf16):
    expected = plain_weights(0)
    for result in ranks:
        weights = result[f"{stage} {is_bf16}"]["weights"]
        assert list(weights) == list(expected)
        for name, values in weights.items():
            rounded = expected[name].bfloat16().float() if is_bf16 else expected[name]
            assert torch.equal(torch.tensor(values), rounded), name


@pytest.mark.slow
@pytest.mark.parametrize("is_bf16", [False, True])
def test_no_rank_holds_more_than_its_share_and_a_module_under_stage_3(ranks, is_bf16):
    weights = plain_weights(0)
    width = 2 if is_bf16 else 4
    whole = width * sum(weight.numel() for weight in weights.values())
    largest = 4 * max(weight.numel() for weight in weights.values())
    rounding = width * len(weights)
    for result in ranks:
        at_stage = {stage: result[f"{stage} {is_bf16}"]["most_bytes"] for stage in (1, 2, 3)}
        assert at_stage[3] <= whole / 2 + largest + rounding
        for stage in (1, 2):
            assert whole / 2 + largest + rounding < at_stage[stage] <= whole + largest


@pytest.mark.slow
@pytest.mark.parametrize("is_bf16", [False, True])
def test_training_from_there_is_the_same_at_every_stage(ranks, is_bf16):
    for result in ranks:
        losses = [result[f"{stage} {is_bf16}"]["losses"] for stage in (1, 2, 3)]
        assert losses[0][-1] < losses[0][0]
        tolerance = 2e-2 if is_bf16 else 1e-5
        torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=0)
        torch.testing.assert_close(losses[2], losses[0], rtol=tolerance, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("is_bf16", [False, True])
def test_freed_memory_is_kept_from_the_first_step_on_and_not_that_of_building(ranks, is_bf16):
    for result in ranks:
        for stage in (1, 2, 3):
            assert result[f"{stage} {is_bf16}"]["memory_kept"] == [["first", "cpu"]]
