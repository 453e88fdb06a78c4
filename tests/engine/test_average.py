"""The average of the weights: torch's own beside it, and nothing left of it where it was used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from average_worker import (
    CASES,
    DECAY,
    LEARNING_RATE,
    STEPS,
    batch_of,
    loss_of,
    make_model,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lgpt.engine.average import decay_at
from lgpt.engine.build import parameter_groups
from lgpt.settings.training import OptimizerSettings

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
import tiny

every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("average") / "found.pt"
    worker = Path(__file__).with_name("average_worker.py")
    tiny.on_two_ranks(worker, out)
    return dict(torch.load(out, weights_only=True))


class TorchsAverage:
    """AveragedModel, with the decay of each update by hand."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.updates = 0
        self.model = AveragedModel(model, multi_avg_fn=self._average)
        self.model.update_parameters(model)  # the first one copies

    def follow(self, model: torch.nn.Module) -> None:
        self.updates += 1
        self.model.update_parameters(model)

    def _average(self, averages: Any, weights: Any, _: Any) -> None:
        decay = min(DECAY, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(averages, weights, None)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.module.named_parameters()}


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """A bare loop with torch's average beside it."""
    model = make_model()
    average = TorchsAverage(model)
    numbers = OptimizerSettings()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, numbers.weight_decay),
        lr=LEARNING_RATE,
        betas=(numbers.beta1, numbers.beta2),
        eps=numbers.eps,
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model(batch_of(step))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.follow(model)
    return average.weights()


def test_the_decay_warms_up_from_two_elevenths_to_its_value():
    assert [decay_at(n, 0.999) for n in (1, 2, 90)] == [2 / 11, 3 / 12, 91 / 100]
    assert decay_at(10**6, 0.999) == 0.999


@pytest.mark.slow
@pytest.mark.parametrize("case", ["zero1_fp32", "zero2_fp32", "zero3_fp32"])
def test_the_average_is_torchs_own_beside_a_bare_loop(found, plain, case):
    """Within 2e-6, of weights of about 1."""
    got = found[case]["average"]
    assert set(got) == {name for name in plain if not name.startswith("frozen")}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=2e-6)
        print(f"{case} {name}: {float((tensor - plain[name]).abs().max()):.1e}")


@pytest.mark.slow
@every_case
def test_the_average_is_torchs_own_of_the_float32_masters(found, case):
    got, (first, *path) = found[case]["average"], found[case]["path"]
    model = make_model()
    model.load_state_dict(first, strict=False)
    average = TorchsAverage(model)
    for masters in path:
        model.load_state_dict(masters, strict=False)
        average.follow(model)
    for name, tensor in got.items():
        # The last bit may differ: a vector is cut elsewhere, and its rest is rounded otherwise.
        torch.testing.assert_close(tensor, average.weights()[name], rtol=2e-7, atol=1e-8)
    moved = max(float((found[case]["masters"][n] - got[n]).abs().max()) for n in got)
    assert moved > 0.01, "the average is where the weights are, so agreement would prove nothing"


@pytest.mark.slow
@every_case
def test_in_use_the_model_computes_with_the_average_and_after_it_as_before(found, case):
    seen = found[case]
    for name, weight in seen["in use"].items():
        expected = seen["average"].get(name, seen["before"][name])  # frozen ones have none
        assert torch.equal(weight, expected.to(weight.dtype)), name
    assert not torch.equal(seen["outputs in use"], seen["outputs before"])
    assert torch.equal(seen["outputs after"], seen["outputs before"])
    for before, after in (("before", "after"), ("masters", "masters after")):
        assert all(torch.equal(seen[before][name], seen[after][name]) for name in seen[before])


@pytest.mark.slow
@every_case
def test_training_after_its_use_is_training_without_it(found, case):
    seen = found[case]
    for name, weight in seen["end without an average"].items():
        assert torch.equal(weight, seen["end"][name]), name
        assert torch.equal(weight, seen["restarted"][name]), name
        assert not torch.equal(weight, seen["masters"][name]), name


@pytest.mark.slow
@every_case
def test_a_skipped_step_does_not_move_it(found, case):
    seen = found[case]
    assert seen["skipped"] == 1
    assert seen["updates after the skipped step"] == STEPS
    assert not seen["moved by the skipped step"]
    assert seen["moved by the next step"]


@pytest.mark.slow
@every_case
def test_a_rank_holds_its_share_and_takes_back_only_that(found, case):
    whole = sum(weight.numel() for weight in found[case]["masters"].values())
    assert found[case]["share"] <= whole / 2 + 8  # padding
    assert found[case]["loaded"]
    assert "elements, the masters" in found[case]["refusal"]


@pytest.mark.slow
@every_case
def test_rows_that_are_put_in_are_in_the_average_too_and_nothing_else_moves(found, case):
    seen = found[case]["rows"]
    for weights, module in (("", "module"), ("average ", "module in use")):
        before, after = seen[f"{weights}before"], seen[f"{weights}after"]
        expected = {name: tensor.clone() for name, tensor in before.items()}
        expected["last.weight"] = expected["last.weight"].view(3, 7)
        expected["last.weight"][[0, 2]] = seen["values"]
        for name, tensor in expected.items():
            assert torch.equal(after[name].view_as(tensor), tensor), name
            assert torch.equal(seen[module][name], tensor.to(seen[module][name].dtype)), name
    row = [seen[name]["last.weight"].view(3, 7)[1] for name in ("after", "average after")]
    assert not torch.equal(*row)
