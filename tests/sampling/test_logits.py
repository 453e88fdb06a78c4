"""The pure part of sampling against slow versions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lgpt.core.errors import SettingsError
from lgpt.sampling.logits import (
    check_sampling,
    draw,
    guidance_at,
    guided,
    keep_top_k,
    keep_top_p,
    next_tokens,
)


def _logits() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 13) * 2


def test_guidance_is_a_line_through_unconditional_and_conditional() -> None:
    conditional, unconditional = _logits(), _logits().flip(0)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    # Ho & Salimans write (1 + w) c - w u, with w = guidance - 1.
    expected = 4.0 * conditional - 3.0 * unconditional
    torch.testing.assert_close(guided(conditional, unconditional, 4.0), expected)


def test_guidance_schedules_rise_from_none_to_all_of_it() -> None:
    for schedule, power in (("linear", 1.0), ("linear", 2.0), ("cosine", 1.0), ("cosine", 2.5)):
        scales = [guidance_at(place, 256, 7.5, schedule, power) for place in range(256)]
        assert scales[0] == 1
        assert scales[-1] == pytest.approx(7.5)
        assert scales == sorted(scales)
    assert {guidance_at(place, 256, 7.5) for place in range(256)} == {7.5}
    assert guidance_at(0, 1, 7.5, "cosine") == 1, "a picture of a single token"


def test_guidance_schedules_are_the_published_ones() -> None:
    # VAR: (1 + t) c - t u with t = cfg * ratio, cfg = g - 1; RAR: pow 2.5, scale 15.5 (its RAR-L).
    assert guidance_at(51, 256, 3.0, "linear") == pytest.approx(1 + 2.0 * 51 / 255)
    step = torch.arange(256) / 255
    rar = (15.5 - 1) * (1 - torch.cos(step**2.5 * torch.pi)) / 2 + 1
    ours = [guidance_at(place, 256, 15.5, "cosine", 2.5) for place in range(256)]
    torch.testing.assert_close(torch.tensor(ours), rar, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_top_k_matches_a_slow_version(k: int) -> None:
    kept = keep_top_k(_logits(), k).isfinite()
    for row, mask in zip(_logits().tolist(), kept.tolist()):
        likeliest = sorted(range(13), key=lambda code: -row[code])[:k]
        assert {code for code in range(13) if mask[code]} == set(likeliest)


@pytest.mark.parametrize("k", [0, 13, 500])
def test_top_k_of_nothing_or_everything_keeps_all(k: int) -> None:
    assert torch.equal(keep_top_k(_logits(), k), _logits())


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_matches_a_slow_version(p: float) -> None:
    kept = keep_top_p(_logits(), p)
    for row, filtered in zip(_logits(), kept):
        probabilities = row.double().softmax(dim=0).tolist()
        nucleus, mass = [], 0.0
        for code in sorted(range(13), key=lambda code: -probabilities[code]):
            nucleus.append(code)
            mass += probabilities[code]
            if mass >= p:
                break
        assert set(filtered.isfinite().nonzero().flatten().tolist()) == set(nucleus)
        assert torch.equal(filtered[nucleus], row[nucleus])


def test_draw_inverts_the_distribution() -> None:
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log()
    wanted = {0.0: 0, 0.199: 0, 0.201: 2, 0.699: 2, 0.701: 3, 1 - 2**-53: 3}
    for uniform, token in wanted.items():
        assert draw(logits, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_draw_never_takes_what_was_filtered_out_even_at_the_very_end() -> None:
    logits = torch.full((1, 16384), 0.1)
    logits[0, 9000:] = float("-inf")
    assert int(draw(logits, torch.tensor([1 - 2**-53], dtype=torch.float64))) == 8999


def test_logits_that_are_nan_still_give_a_code() -> None:
    logits = torch.tensor([[float("nan")] * 4, [0.0, float("inf"), 0.0, 0.0], [0.0] * 4])
    tokens = draw(logits, torch.tensor([0.5, 0.5, 0.6]))
    assert tokens.tolist() == [3, 3, 2]


def test_draws_have_the_softmax_s_frequencies() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    torch.manual_seed(0)
    many = 20_000
    tokens = next_tokens(logits.expand(many, -1) * 2.5, torch.rand(many), temperature=2.5)
    frequencies = tokens.bincount(minlength=4) / many
    torch.testing.assert_close(frequencies, logits.softmax(dim=0), atol=0.01, rtol=0)


def test_low_temperature_and_top_k_1_take_the_likeliest() -> None:
    logits, uniforms = _logits(), torch.rand(5)
    likeliest = logits.argmax(dim=1)
    assert torch.equal(next_tokens(logits, uniforms, temperature=1e-4), likeliest)
    assert torch.equal(next_tokens(logits, uniforms, top_k=1), likeliest)
    assert torch.equal(next_tokens(logits.bfloat16(), uniforms, top_p=1e-6), likeliest)


def test_numbers_without_meaning_are_refused_all_at_once() -> None:
    with pytest.raises(SettingsError) as raised:
        check_sampling(-1.0, 0.0, -2, 1.5, guidance_schedule="sine", guidance_power=0.0)
    for part in ("got -1.0", "got 0.0;", "got -2", "got 1.5", "cosine, got 'sine'", "got 0.0; 1"):
        assert part in str(raised.value)
    with pytest.raises(SettingsError, match=r"guidance_power 2\.0 has no effect with .* constant"):
        check_sampling(3.0, 1.0, 0, 1.0, guidance_power=2.0)
    check_sampling(guidance=0.0, temperature=0.1, top_k=0, top_p=1.0)
