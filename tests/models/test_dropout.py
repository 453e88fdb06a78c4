"""Dropout on a CPU: PyTorch's by every property, from fewer random numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lgpt.core.errors import SettingsError
from lgpt.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.003, 0.1, 0.5, 0.9])
def test_drops_its_share_and_scales_the_rest(p: float) -> None:
    torch.manual_seed(0)
    dropped = Dropout(p)(torch.ones(401, 1001, dtype=torch.float64))  # no multiple of 4
    count = dropped.numel()
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs(float((dropped == 0).double().mean()) - p) < 5 * deviation + 2**-17
    kept = dropped[dropped != 0]
    assert bool((kept == kept[0]).all())
    assert float(kept[0]) == pytest.approx(1 / (1 - p), rel=2**-16 / (1 - p))


def test_values_are_dropped_one_by_one() -> None:
    """No quarter of a random number is like another, and neighbours know nothing of each other."""
    torch.manual_seed(1)
    zeros = (Dropout(0.1)(torch.ones(2**20)) == 0).double()
    shares = zeros.view(-1, 4).mean(dim=0)
    assert bool((shares - 0.1).abs().max() < 5 * (0.09 / 2**18) ** 0.5)
    centred = (zeros - zeros.mean()) / zeros.std()
    for distance in (1, 2, 3, 4, 5, 8):
        correlation = float((centred[distance:] * centred[:-distance]).mean())
        assert abs(correlation) < 5 / 2**10


def test_gradient_passes_where_values_do() -> None:
    x = torch.randn(7, 33, requires_grad=True)
    dropped = Dropout(0.4)(x)
    dropped.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(dropped, x * x.grad)
    assert 0 < int((x.grad == 0).sum()) < x.numel()


def test_seed_decides_and_the_next_call_differs() -> None:
    dropout, x = Dropout(0.5), torch.ones(64)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x))
    assert not torch.equal(first, second)


def test_does_nothing_where_pytorch_does_nothing() -> None:
    x = torch.randn(5)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    state = torch.get_rng_state()
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_mean_and_spread_are_those_of_pytorch_in_bf16() -> None:
    torch.manual_seed(5)
    x = torch.randn(1000, 1000).bfloat16()
    ours, theirs = Dropout(0.1)(x).float(), functional.dropout(x, 0.1).float()
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=5e-3)
    assert float((ours * x).mean()) == pytest.approx(float((theirs * x).mean()), rel=5e-3)


def test_compiled_dropout_is_one_graph() -> None:
    """Dynamo breaks a graph at `random_`."""
    torch.manual_seed(6)
    compiled = torch.compile(Dropout(0.25), fullgraph=True, backend="aot_eager")
    dropped = compiled(torch.ones(10000))
    assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.03


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_other_shares_are_refused(p: float) -> None:
    with pytest.raises(SettingsError, match=f"dropout is {p}"):
        Dropout(p)


def test_all_but_everything_can_be_dropped() -> None:
    assert bool(Dropout(0.9999999)(torch.ones(100)).isfinite().all())
