"""The quantizer against slow, obvious versions of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lgpt.models.codebook import nearest_codes
from lgpt.models.quantizer import VectorQuantizer


def _rows(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


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
    quantizer(torch.randn(2, 3, 4, 4))  # lays the codes down
    sums, counts = list(quantizer.ema_sum.clone()), quantizer.ema_count.tolist()
    for _ in range(5):
        z = torch.randn(2, 3, 4, 4)
        before = quantizer.embedding.weight.clone()
        quantized = quantizer(z)
        codes = before[quantized.tokens].permute(0, 3, 1, 2)
        torch.testing.assert_close(quantized.latents, codes)
        assert quantized.codebook_loss == 0
        slow = _slow_ema(sums, counts, _rows(z), quantized.tokens.flatten().tolist(), 0.8)
        torch.testing.assert_close(quantizer.embedding.weight, torch.stack(slow))


def test_codes_start_on_latents_of_the_first_batch_so_that_none_is_dead() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4, update="ema")
    z = torch.randn(1, 4, 8, 8) * 7 + 20  # far from any initial code
    quantizer(z)
    assert quantizer.is_initialized == 1
    quantizer.eval()
    assert len(quantizer.tokens_of(z).unique()) == 32


def test_first_batch_smaller_than_the_codebook_still_gives_distinct_codes() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4, update="ema")
    quantizer(torch.randn(1, 4, 2, 2))
    assert len(quantizer.embedding.weight.unique(dim=0)) == 64


def test_a_code_that_is_not_used_comes_back_and_stays_where_it_was_put() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 2, 8, 8)

    def codes_used(revive: bool) -> int:
        quantizer = VectorQuantizer(8, 2, update="ema", ema_decay=0.5, revive_dead_codes=revive)
        quantizer(z)
        quantizer.embedding.weight[1:] = 1e3  # only code 0 is near anything
        quantizer.ema_sum.copy_(quantizer.embedding.weight * quantizer.ema_count[:, None])
        for _ in range(12):
            quantizer(z)
        return len(quantizer.eval().tokens_of(z).unique())

    assert codes_used(revive=False) == 1
    assert codes_used(revive=True) == 8


def test_codes_stand_still_in_eval_mode_and_when_encoding() -> None:
    quantizer = VectorQuantizer(8, 2, update="ema")
    quantizer(torch.randn(2, 2, 4, 4))
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.tokens_of(torch.randn(2, 2, 4, 4))
    quantizer.eval()(torch.randn(2, 2, 4, 4))
    after = quantizer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


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
    for _ in range(3):
        first(torch.randn(2, 2, 4, 4))
    second = VectorQuantizer(8, 2, update="ema", revive_dead_codes=False)
    second.load_state_dict(first.state_dict())
    z = torch.randn(2, 2, 4, 4)
    first(z), second(z)
    assert torch.equal(first.embedding.weight, second.embedding.weight)


def _two_rank_worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(rank)
    torch.set_num_threads(1)
    averaged = torch.load(f"{folder}/start.pt", weights_only=True)
    quantizer = VectorQuantizer(6, 3, update="ema", revive_dead_codes=False)
    quantizer.load_state_dict(averaged["state"])
    quantizer(averaged["z"][rank : rank + 1])
    fresh = VectorQuantizer(6, 3, update="ema", ema_decay=0.5)
    for _ in range(8):
        fresh(torch.randn(1, 3, 2, 1))  # two latents, six codes: somebody is always dead
    torch.save([quantizer.state_dict(), fresh.state_dict()], f"{folder}/rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_average_like_one_and_revive_the_same_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    single = VectorQuantizer(6, 3, update="ema", revive_dead_codes=False)
    single(torch.randn(2, 3, 4, 4))
    z = torch.randn(2, 3, 4, 4)
    torch.save({"state": single.state_dict(), "z": z}, tmp_path / "start.pt")
    torch.multiprocessing.spawn(_two_rank_worker, (str(tmp_path),), nprocs=2)
    single(z)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in single.state_dict().items():
        torch.testing.assert_close(ranks[0][0][name], tensor)
    for name, tensor in ranks[0][1].items():
        assert torch.equal(tensor, ranks[1][1][name]), name
