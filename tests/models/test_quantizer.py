"""The quantizer against slow, obvious versions of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lgpt.models.codebook import entropy_loss, nearest_codes
from lgpt.models.quantizer import Quantized, VectorQuantizer
from lgpt.training.places import micro_batches_of


def _rows(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def _train_on(quantizer: VectorQuantizer, *micro_batches: Tensor, step: int = 0) -> Quantized:
    """One training step as the task does it; the last micro batch's output."""
    quantizer.train()
    quantizer.begin_step()
    outputs = [quantizer(z) for z in micro_batches]
    quantizer.finish_step(seed=0, step=step)
    return outputs[-1]


def test_nearest_codes_matches_brute_force() -> None:
    torch.manual_seed(0)
    z, codebook = torch.randn(2, 5, 3, 4), torch.randn(17, 5)
    slow = [
        min(range(17), key=lambda k: float((row - codebook[k]).pow(2).sum())) for row in _rows(z)
    ]
    assert nearest_codes(z, codebook).flatten().tolist() == slow


def test_nearest_codes_are_searched_in_float32_even_for_bf16_latents_under_autocast() -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 4, 8, 8).bfloat16()
    codebook = torch.randn(64, 4) * 0.01 + 3  # close together and far from 0: bf16 would cancel
    exact = torch.cdist(_rows(z.double()), codebook.double()).argmin(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_codes(z, codebook).flatten()
    assert torch.equal(found, exact)
    rounded = torch.cdist(_rows(z).float(), codebook.bfloat16().float()).argmin(dim=1)
    assert not torch.equal(rounded, exact), "this input could not tell bf16 from float32"


def test_many_latents_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    z, codebook = torch.randn(3, 4, 5, 5), torch.randn(9, 4)
    whole = nearest_codes(z, codebook)
    monkeypatch.setattr("lgpt.models.codebook._MAX_DISTANCES", 9 * 4)
    assert torch.equal(nearest_codes(z, codebook), whole)


def test_gradients_go_straight_through_and_beta_weighs_the_encoder_side() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 3)
    z = torch.randn(2, 3, 2, 2, requires_grad=True)
    quantized = quantizer(z)
    codes = quantizer.embedding.weight.detach()[quantized.tokens].permute(0, 3, 1, 2)
    torch.testing.assert_close(quantized.latents, codes)
    towards = torch.randn_like(z)
    (quantized.latents * towards).sum().backward()
    torch.testing.assert_close(z.grad, towards)
    assert quantizer.embedding.weight.grad is None

    z.grad = None
    quantized = quantizer(z)
    quantized.commitment_loss.backward()
    assert quantizer.embedding.weight.grad is None, "the commitment term moves the encoder only"
    torch.testing.assert_close(z.grad, 2 * (z.detach() - codes) / z.numel())

    z.grad = None
    quantizer(z).codebook_loss.backward()
    assert z.grad is None, "the codebook term moves the codes only"
    by_hand = torch.zeros_like(quantizer.embedding.weight)
    for row, token in zip(_rows(z.detach()), quantized.tokens.flatten()):
        by_hand[token] += 2 * (quantizer.embedding.weight.detach()[token] - row) / z.numel()
    torch.testing.assert_close(quantizer.embedding.weight.grad, by_hand)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_normalized_codes_are_found_by_angle_and_given_at_unit_length(update: str) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, is_normalized=True, update=update).eval()
    quantizer.embedding.weight.data.mul_(torch.rand(16, 1) * 9 + 1)  # lengths must not matter
    z = torch.randn(2, 4, 3, 3) * 5
    quantized = quantizer(z)
    cosine = functional.cosine_similarity(
        _rows(z)[:, None], quantizer.embedding.weight[None], dim=2
    )
    assert torch.equal(quantized.tokens.flatten(), cosine.argmax(dim=1))
    torch.testing.assert_close(quantized.latents.norm(dim=1), torch.ones(2, 3, 3))
    torch.testing.assert_close(quantizer.lookup(quantized.tokens), quantized.latents)
    assert torch.equal(quantizer.tokens_of(z), quantized.tokens)


def _slow_ema(
    sums: list[Tensor], counts: list[float], rows: Tensor, tokens: list[int], decay: float
) -> list[Tensor]:
    """One moving average a code, one latent at a time."""
    codes = []
    for code in range(len(sums)):
        mine = [row for row, token in zip(rows, tokens) if token == code]
        total = torch.stack(mine).sum(dim=0) if mine else torch.zeros_like(sums[code])
        sums[code] = decay * sums[code] + (1 - decay) * total
        counts[code] = decay * counts[code] + (1 - decay) * len(mine)
        codes.append(sums[code] / counts[code])
    return codes


def test_moving_averages_match_a_slow_version() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 3, update="ema", ema_decay=0.8, revive_dead_codes=False)
    _train_on(quantizer, torch.randn(2, 3, 4, 4))  # lays the codes down
    sums, counts = list(quantizer.ema_sum.clone()), quantizer.ema_count.tolist()
    for _ in range(5):
        z = torch.randn(2, 3, 4, 4)
        before = quantizer.embedding.weight.clone()
        quantized = _train_on(quantizer, z)
        codes = before[quantized.tokens].permute(0, 3, 1, 2)
        torch.testing.assert_close(quantized.latents, codes)
        assert quantized.codebook_loss == 0
        slow = _slow_ema(sums, counts, _rows(z), quantized.tokens.flatten().tolist(), 0.8)
        torch.testing.assert_close(quantizer.embedding.weight, torch.stack(slow))


def test_codes_start_on_latents_of_the_first_batch_so_that_none_is_dead() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4, update="ema")
    z = torch.randn(1, 4, 8, 8) * 7 + 20  # far from any initial code
    _train_on(quantizer, z)
    assert quantizer.is_initialized == 1
    quantizer.eval()
    assert len(quantizer.tokens_of(z).unique()) == 32


def test_first_batch_smaller_than_the_codebook_still_gives_distinct_codes() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4, update="ema")
    _train_on(quantizer, torch.randn(1, 4, 2, 2))
    assert len(quantizer.embedding.weight.unique(dim=0)) == 64


def test_a_code_that_is_not_used_comes_back_and_stays_where_it_was_put() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 2, 8, 8)

    def codes_used(revive: bool) -> int:
        quantizer = VectorQuantizer(8, 2, update="ema", ema_decay=0.5, revive_dead_codes=revive)
        _train_on(quantizer, z)
        quantizer.embedding.weight[1:] = 1e3  # only code 0 is near anything
        quantizer.ema_sum.copy_(quantizer.embedding.weight * quantizer.ema_count[:, None])
        for step in range(12):
            _train_on(quantizer, z, step=step)
        return len(quantizer.eval().tokens_of(z).unique())

    assert codes_used(revive=False) == 1
    assert codes_used(revive=True) == 8


def _state(quantizer: VectorQuantizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def _assert_unmoved(quantizer: VectorQuantizer, before: dict[str, Tensor]) -> None:
    after = quantizer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_codes_stand_still_in_eval_mode_when_encoding_and_after_a_trial_batch() -> None:
    quantizer = VectorQuantizer(8, 2, update="ema")
    _train_on(quantizer, torch.randn(2, 2, 4, 4))
    before = _state(quantizer)
    quantizer.tokens_of(torch.randn(2, 2, 4, 4))
    quantizer(torch.randn(2, 2, 4, 4))  # a trial batch, forgotten by the next begin_step
    quantizer.begin_step()
    quantizer.eval()(torch.randn(2, 2, 4, 4))
    assert quantizer.finish_step(seed=0, step=1) == 0
    _assert_unmoved(quantizer, before)


def test_a_latent_that_is_not_finite_does_not_reach_the_codes() -> None:
    quantizer = VectorQuantizer(8, 2, update="ema")
    _train_on(quantizer, torch.randn(2, 2, 4, 4))
    before = _state(quantizer)
    bad = torch.randn(2, 2, 4, 4)
    bad[1, 0, 2, 2] = float("nan")
    _train_on(quantizer, bad)
    _assert_unmoved(quantizer, before)


def test_restarted_codes_are_counted() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 2, update="ema", ema_decay=0.5)
    _train_on(quantizer, torch.randn(2, 2, 4, 4))
    quantizer.ema_count[3:5] = 0.0
    quantizer.embedding.weight[3:5] = 1e3
    quantizer.begin_step()
    quantizer(torch.randn(2, 2, 4, 4))
    assert quantizer.finish_step(seed=0, step=1) == 2
    assert quantizer.embedding.weight.abs().max() < 10


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_latents_are_drawn_from_those_of_the_step_and_differently_each_step(update: str) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 2, update=update)
    z = torch.randn(2, 2, 4, 4)
    quantizer(torch.randn(2, 2, 4, 4))
    quantizer.begin_step(notes_latents=True)
    quantizer(z)
    drawn = [quantizer.drawn_latents(5, seed=3, step=step) for step in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    there = {tuple(row) for row in z.permute(0, 2, 3, 1).reshape(-1, 2).tolist()}
    rows = {tuple(row) for row in drawn[0].tolist()}
    assert len(rows) == 5
    assert rows <= there


def test_a_step_notes_latents_of_learned_codes_only_when_it_is_told() -> None:
    quantizer = VectorQuantizer(8, 2, update="gradient")
    for notes in (True, False):
        quantizer.begin_step(notes_latents=notes)
        quantizer(torch.randn(2, 2, 4, 4))
        assert len(quantizer._seen) == int(notes)
        assert quantizer.finish_step(seed=0, step=0) == 0
        assert not quantizer._seen


def test_a_placed_code_stays_near_its_latent_in_the_next_average() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 2, update="ema", revive_dead_codes=False)
    for _ in range(3):
        _train_on(quantizer, torch.randn(4, 2, 4, 4))
    place = torch.tensor([[30.0, 40.0]])
    quantizer.place(torch.tensor([2]), place)
    assert torch.equal(quantizer.embedding.weight[2:3], place)
    _train_on(quantizer, torch.randn(4, 2, 4, 4))  # nobody takes it there
    torch.testing.assert_close(quantizer.embedding.weight[2:3], place)
    _train_on(quantizer, place.view(1, 2, 1, 1).expand(4, 2, 4, 4) + 1.0)
    moved = quantizer.embedding.weight[2] - place[0]
    # 64 latents against a fair share of about 16, of which a hundredth comes in.
    assert torch.all((moved > 0.01) & (moved < 0.1)), moved


def _reference_entropy_loss(affinity: Tensor, temperature: float, eps: float = 1e-5) -> Tensor:
    """MAGVIT's `entropy_loss`, line by line."""
    flat_affinity = affinity.reshape(-1, affinity.shape[-1]) / temperature
    probs = flat_affinity.softmax(dim=-1)
    log_probs = (flat_affinity + eps).log_softmax(dim=-1)
    avg_probs = probs.mean(dim=0)
    avg_entropy = -torch.sum(avg_probs * torch.log(avg_probs + eps))
    sample_entropy = -torch.mean(torch.sum(probs * log_probs, dim=-1))
    return sample_entropy - avg_entropy


def test_entropy_loss_and_its_gradients_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    z, codes = torch.randn(30, 4), torch.randn(12, 4)
    results = []
    for pieces in (False, True):
        if pieces:  # built piece by piece and once more in the backward
            monkeypatch.setattr("lgpt.models.codebook._MAX_DISTANCES", 12 * 7)
        leaves = [z.clone().requires_grad_(), codes.clone().requires_grad_()]
        loss = entropy_loss(*leaves, 0.5)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    leaves = [z.clone().requires_grad_(), codes.clone().requires_grad_()]
    expected = _reference_entropy_loss(-torch.cdist(*leaves).square(), 0.5)
    gradients = torch.autograd.grad(expected, leaves)
    for got in results:
        for mine, theirs in zip(got, (expected.detach(), *gradients)):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert min(float(gradient.abs().max()) for gradient in gradients) > 1e-3


def test_entropy_loss_is_lowest_for_sure_and_even_choices() -> None:
    codes = torch.eye(4) * 3
    even = entropy_loss(codes.repeat(5, 1), codes, 0.01)
    assert even == pytest.approx(-torch.log(torch.tensor(4.0)).item(), abs=1e-3)
    assert entropy_loss(codes[:1].repeat(5, 1), codes, 0.01) == pytest.approx(0.0, abs=1e-3)
    assert entropy_loss(torch.zeros(5, 4), codes, 0.01) == pytest.approx(0.0, abs=1e-3)


def test_entropy_is_given_in_training_alone_and_at_unit_length() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 3, is_normalized=True, entropy_temperature=0.1)
    quantizer.embedding.weight.data.mul_(5.0)
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = quantizer(z).entropy_loss
    expected = entropy_loss(
        functional.normalize(_rows(z), dim=1), functional.normalize(quantizer.embedding.weight), 0.1
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert z.grad.abs().max() > 0
    assert quantizer.embedding.weight.grad.abs().max() > 0
    assert quantizer.eval()(z).entropy_loss == 0
    assert VectorQuantizer(8, 3)(z).entropy_loss == 0


def test_moving_averages_stay_float32_when_the_model_is_cast_to_bf16() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), VectorQuantizer(8, 4, update="ema"))
    model.bfloat16()
    quantizer = model[1]
    assert model[0].weight.dtype == torch.bfloat16
    dtypes = {name: tensor.dtype for name, tensor in quantizer.state_dict().items()}
    assert dtypes.pop("is_initialized") == torch.uint8
    assert set(dtypes) == {"embedding.weight", "ema_count", "ema_sum"}
    assert set(dtypes.values()) == {torch.float32}
    quantized = model(torch.randn(2, 3, 4, 4).bfloat16())
    assert quantized.latents.dtype == torch.bfloat16
    assert quantized.commitment_loss.dtype == torch.float32


def test_state_survives_a_round_trip_and_goes_on_the_same() -> None:
    torch.manual_seed(0)
    first = VectorQuantizer(8, 2, update="ema", revive_dead_codes=False)
    for step in range(3):
        _train_on(first, torch.randn(2, 2, 4, 4), step=step)
    second = VectorQuantizer(8, 2, update="ema", revive_dead_codes=False)
    second.load_state_dict(first.state_dict())
    z = torch.randn(2, 2, 4, 4)
    _train_on(first, z)
    _train_on(second, z)
    assert torch.equal(first.embedding.weight, second.embedding.weight)


CASES = {
    "plain": {"revive_dead_codes": True},
    "unit length, no revival": {"is_normalized": True, "revive_dead_codes": False},
    "unit length, more codes than latents": {"is_normalized": True},
}
CODES = {"unit length, more codes than latents": 100}
STEPS, PICTURES = 6, 8
WORLDS = ((4, 1), (2, 2))  # ranks and micro batch: two micro batches a rank


def _trained_on_my_share(rank: int, world: int, micro_batch: int) -> dict[str, dict[str, Tensor]]:
    """State after some steps in which this rank sees its micro batches of every global batch."""
    states = {}
    for name, arguments in CASES.items():
        torch.manual_seed(0)
        quantizer = VectorQuantizer(
            CODES.get(name, 24), 3, update="ema", ema_decay=0.5, **arguments
        )
        restarted = 0
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            # They wander off, so that codes are left behind.
            pictures = torch.randn(PICTURES, 3, 2, 3, generator=generator) + step
            quantizer.begin_step()
            for places in micro_batches_of(
                0, global_batch=PICTURES, micro_batch=micro_batch, rank=rank, world=world
            ):
                quantizer(pictures[torch.from_numpy(places)])
            restarted += quantizer.finish_step(seed=4, step=step)
        states[name] = {**_state(quantizer), "restarted": torch.tensor(restarted)}
    return states


def _entropy_gradients(z: Tensor, codes: Tensor) -> Tensor:
    leaves = [z.clone().requires_grad_(), codes.clone().requires_grad_()]
    return torch.autograd.grad(entropy_loss(*leaves, 0.5), leaves)[1]


def _rank_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    z, codes = torch.load(f"{folder}/entropy.pt", weights_only=True)
    for world, micro_batch in WORLDS:
        if rank >= world:
            continue
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world
        )
        torch.manual_seed(100 + rank)  # nobody's own generator may decide
        gradient = _entropy_gradients(z.chunk(world)[rank], codes)
        torch.distributed.all_reduce(gradient)
        result = (_trained_on_my_share(rank, world, micro_batch), gradient / world)
        torch.save(result, f"{folder}/world{world}_rank{rank}.pt")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_one_two_and_four_ranks_with_the_same_global_batch_make_the_same_codebook(
    tmp_path: Path,
) -> None:
    """Whatever the accumulation, float32, to a relative 1e-6; each rank's own to the last bit."""
    torch.manual_seed(7)
    z, codes = torch.randn(24, 3), torch.randn(10, 3)
    torch.save([z, codes], tmp_path / "entropy.pt")
    alone = _trained_on_my_share(0, 1, PICTURES)
    others = [(_trained_on_my_share(0, 1, 2), None)]  # 4 micro batches
    torch.multiprocessing.spawn(_rank_worker, (str(tmp_path),), nprocs=4)
    for world, _ in WORLDS:
        results = [
            torch.load(tmp_path / f"world{world}_rank{rank}.pt", weights_only=True)
            for rank in range(world)
        ]
        for states, gradient in results[1:]:
            assert torch.equal(gradient, results[0][1])
            for name in CASES:
                for key, tensor in states[name].items():
                    assert torch.equal(tensor, results[0][0][name][key]), (name, key)
        others.append(results[0])
    expected_gradient = _entropy_gradients(z, codes)
    for states, gradient in others:
        for name in CASES:
            for key, tensor in alone[name].items():
                torch.testing.assert_close(states[name][key], tensor, rtol=1e-6, atol=1e-7)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    assert alone["plain"]["restarted"] > 0, "nothing was revived, so agreement would prove little"
