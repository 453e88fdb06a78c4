"""Generation against a slow version without a cache, and what a picture may depend on."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.sampling.generate import generate_tokens
from lgpt.sampling.logits import guidance_at


@pytest.fixture(scope="module")
def model() -> LatentGPT:
    torch.manual_seed(0)
    model = LatentGPT(LatentGPTConfig(24, 2, 3, 8, layers=2, hidden=16, heads=2)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def _captions() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()


def _slow(
    model: LatentGPT,
    text: Tensor,
    mask: Tensor,
    scales: list[float],
    temperature: float,
    seed: int,
    given: Sequence[int] = (),
) -> list[int]:
    """One picture, the whole sequence again for every token, the two halves one after the other."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(6, generator=generator, dtype=torch.float64)
    tokens = torch.zeros(1, 6, dtype=torch.long)
    tokens[0, : len(given)] = torch.tensor(given, dtype=torch.long)
    for position in range(len(given), 6):
        with_text = model(tokens, text, mask)[:, position]
        without = model(tokens)[:, position]
        logits = (without + scales[position] * (with_text - without)) / temperature
        sums = logits.double().softmax(dim=1).cumsum(dim=1)[0]
        tokens[0, position] = int((sums <= uniforms[position] * sums[-1]).sum())
    return tokens[0].tolist()


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_cached_batched_generation_matches_a_slow_version(
    model: LatentGPT, guidance: float
) -> None:
    text, mask = _captions()
    seeds = [11, 12, 13]
    drawn = generate_tokens(model, text, mask, guidance=guidance, temperature=0.8, seeds=seeds)
    assert drawn.shape == (3, 2, 3)
    for row, seed in enumerate(seeds):
        slow = _slow(model, text[row : row + 1], mask[row : row + 1], [guidance] * 6, 0.8, seed)
        assert drawn[row].flatten().tolist() == slow


@pytest.mark.parametrize(("schedule", "power"), [("linear", 1.0), ("cosine", 2.5)])
def test_scheduled_guidance_matches_a_slow_version(
    model: LatentGPT, schedule: str, power: float
) -> None:
    text, mask = _captions()
    drawn = generate_tokens(
        model,
        text,
        mask,
        guidance=6.0,
        guidance_schedule=schedule,
        guidance_power=power,
        seeds=[3, 4, 5],
    )
    scales = [guidance_at(place, 6, 6.0, schedule, power) for place in range(6)]
    for row, seed in enumerate([3, 4, 5]):
        slow = _slow(model, text[row : row + 1], mask[row : row + 1], scales, 1.0, seed)
        assert drawn[row].flatten().tolist() == slow
    assert not torch.equal(drawn, generate_tokens(model, text, mask, guidance=6.0, seeds=[3, 4, 5]))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_given_tokens_stay_and_the_rest_is_drawn_after_them(model: LatentGPT, count: int) -> None:
    text, mask = _captions()
    torch.manual_seed(2)
    given = torch.randint(24, (3, count))
    told: list[int] = []
    drawn = generate_tokens(
        model, text, mask, guidance=2.0, seeds=[7, 8, 9], given=given, progress=told.append
    )
    for row, seed in enumerate([7, 8, 9]):
        captions = (text[row : row + 1], mask[row : row + 1])
        slow = _slow(model, *captions, [2.0] * 6, 1.0, seed, given[row].tolist())
        assert drawn[row].flatten().tolist() == slow
    assert told == [count, *[1] * (6 - count)]


def test_a_picture_s_own_beginning_leads_to_the_same_picture(model: LatentGPT) -> None:
    text, mask = _captions()
    whole = generate_tokens(model, text, mask, guidance=2.0, seeds=[1, 2, 3])
    again = generate_tokens(
        model, text, mask, guidance=2.0, seeds=[1, 2, 3], given=whole.flatten(1)[:, :3]
    )
    assert torch.equal(again, whole)


def test_rows_are_shown_as_they_are_done(model: LatentGPT) -> None:
    seen: list[Tensor] = []
    whole = generate_tokens(model, seeds=[1, 2], row_done=lambda rows: seen.append(rows.clone()))
    assert [rows.shape for rows in seen] == [(2, 1, 3), (2, 2, 3)]
    assert torch.equal(seen[0], whole[:, :1])
    assert torch.equal(seen[1], whole)


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_its_company(model: LatentGPT) -> None:
    text, mask = _captions()
    together = generate_tokens(model, text, mask, guidance=2.0, seeds=[5, 6, 7])
    alone = generate_tokens(model, text[1:2], mask[1:2], guidance=2.0, seeds=[6])
    assert torch.equal(alone[0], together[1])
    turned = generate_tokens(model, text.flip(0), mask.flip(0), guidance=2.0, seeds=[7, 6, 5])
    assert torch.equal(turned.flip(0), together)
    padded = torch.cat([text, torch.randn(3, 2, 8)], dim=1)
    padded_mask = torch.nn.functional.pad(mask, (0, 2))
    again = generate_tokens(model, padded, padded_mask, guidance=2.0, seeds=[5, 6, 7])
    assert torch.equal(again, together)
    other = generate_tokens(model, text, mask, guidance=2.0, seeds=[8, 9, 10])
    assert not torch.equal(other, together)


def test_global_random_state_neither_matters_nor_moves(model: LatentGPT) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate_tokens(model, seeds=[1, 2])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(generate_tokens(model, seeds=[1, 2]), first)


def test_progress_is_told_of_every_token(model: LatentGPT) -> None:
    steps: list[int] = []
    generate_tokens(model, seeds=[1], progress=steps.append)
    assert steps == [1] * 6


def test_unconditional_model_draws_without_text() -> None:
    model = LatentGPT(LatentGPTConfig(24, 2, 3, None, layers=1, hidden=16, heads=2)).eval()
    assert generate_tokens(model, seeds=[1, 2, 3]).shape == (3, 2, 3)


def test_what_does_not_fit_together_is_refused(model: LatentGPT) -> None:
    text, mask = _captions()
    with pytest.raises(ValueError, match=r"guidance 2\.0 has no effect without text"):
        generate_tokens(model, guidance=2.0, seeds=[1])
    with pytest.raises(ValueError, match="3 rows of text for 2 seeds"):
        generate_tokens(model, text, mask, seeds=[1, 2])
    with pytest.raises(ValueError, match=r"given tokens are \[1, 6\] for 1 seeds .* of 6 tokens"):
        generate_tokens(model, seeds=[1], given=torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(SettingsError, match="temperature must be greater than 0, got 0"):
        generate_tokens(model, text, mask, temperature=0.0, seeds=[1, 2, 3])


def test_weights_that_are_not_finite_are_refused_and_can_be_drawn_on_with(model: LatentGPT) -> None:
    broken = copy.deepcopy(model)
    for parameter in broken.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"logits are not finite.*an earlier checkpoint"):
        generate_tokens(broken, seeds=[1, 2])
    tokens = generate_tokens(broken, seeds=[1, 2], must_be_finite=False)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < model.config.codebook_size
