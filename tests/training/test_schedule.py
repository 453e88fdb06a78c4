"""The learning rate against a slow obvious version and torch's own scheduler."""

from __future__ import annotations

import pytest
import torch

from lgpt.training.schedule import learning_rate_at


def _rates(decay: str, final_ratio: float, warmup: int = 10, steps: int = 50) -> list[float]:
    return [
        learning_rate_at(
            step,
            peak=2e-3,
            warmup_steps=warmup,
            max_steps=steps,
            decay=decay,  # type: ignore[arg-type]
            final_ratio=final_ratio,
        )
        for step in range(steps)
    ]


def test_warmup_rises_linearly_to_the_peak():
    rates = _rates("constant", 1.0)
    assert rates[:10] == pytest.approx([2e-3 * (i + 1) / 10 for i in range(10)])
    assert rates[10:] == pytest.approx([2e-3] * 40)


def test_cosine_matches_torch_annealing():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=39, eta_min=2e-4)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert _rates("cosine", 0.1)[10:] == pytest.approx(expected)


def test_linear_decay_ends_at_its_final_ratio():
    rates = _rates("linear", 0.25)
    assert rates[-1] == pytest.approx(0.25 * 2e-3)
    steps = [a - b for a, b in zip(rates[10:], rates[11:])]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_a_time_budget_that_runs_out_first_decides_the_decay():
    def rate(step: int, spent: float) -> float:
        return learning_rate_at(
            step,
            peak=1.0,
            warmup_steps=0,
            max_steps=101,
            decay="linear",
            final_ratio=0.0,
            spent_share=spent,
        )

    assert rate(10, 0.6) == pytest.approx(0.4)
    assert rate(80, 0.6) == pytest.approx(0.2)
    assert rate(10, 1.3) == 0.0
