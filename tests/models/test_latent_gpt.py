"""LatentGPT: what may depend on what, decoding, counting, files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.settings.transformer import TransformerSettings

TINY = LatentGPTConfig(
    codebook_size=32, grid_height=2, grid_width=3, text_width=8, layers=2, hidden=16, heads=2
)
VARIANTS = [
    {},
    {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "qk_norm": False},
]


def _model(**changes: Any) -> LatentGPT:
    """With a head that is not zero, so that logits say something."""
    torch.manual_seed(0)
    model = LatentGPT(dataclasses.replace(TINY, **changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    return torch.randint(32, (3, 6)), torch.randn(3, 4, 8), mask


def test_reference_model_has_512_million_parameters() -> None:
    with torch.device("meta"):
        config = LatentGPTConfig.from_settings(TransformerSettings(), 16384, (16, 16), 512)
        model = LatentGPT(config)
    assert model.num_parameters() == pytest.approx(511.7e6, rel=1e-3)
    matrices = 24 * (4 + 2 + 3 * 4) * 1024**2 + 24 * 2 * 512 * 1024 + 2 * 16384 * 1024
    assert 0 < model.num_parameters() - matrices < 200_000, "the rest is norms, start and null"


def test_first_loss_of_a_zero_head_is_exactly_ln_of_the_codebook_size() -> None:
    tokens, text, mask = _batch()
    model = LatentGPT(dataclasses.replace(TINY, zero_head=True))
    loss = model(tokens, text, mask, targets=tokens)
    assert loss.item() == pytest.approx(math.log(32))


def test_initial_weights_have_the_stated_spread() -> None:
    torch.manual_seed(0)
    model = LatentGPT(dataclasses.replace(TINY, hidden=128, layers=8)).requires_grad_(False)
    block = model.blocks[0]
    assert float(block.self_attention.qkv.weight.std()) == pytest.approx(0.02, rel=0.05)
    for residual in (block.self_attention.out, block.cross_attention.out, block.mlp.down):
        assert float(residual.weight.std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert float(model.head.weight.std()) == pytest.approx(0.25 / 128**0.5, rel=0.05)


@pytest.mark.parametrize("changes", VARIANTS)
def test_logits_see_only_earlier_tokens(changes: dict[str, Any]) -> None:
    tokens, text, mask = _batch()
    model = _model(**changes)
    before = model(tokens, text, mask)
    for position in range(6):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 32
        differs = (model(changed, text, mask) - before).abs().amax(dim=(0, 2)) > 1e-6
        assert not differs[: position + 1].any()
        assert differs[position + 1 :].all()


def test_padding_of_a_caption_never_leaks() -> None:
    tokens, text, mask = _batch()
    model = _model()
    expected = model(tokens, text, mask)
    filled = torch.where(mask.unsqueeze(-1), text, torch.full_like(text, 37.0))
    torch.testing.assert_close(model(tokens, filled, mask), expected)
    longer = torch.cat([text, torch.randn(3, 5, 8)], dim=1)
    torch.testing.assert_close(model(tokens, longer, functional.pad(mask, (0, 5))), expected)
    assert not torch.allclose(model(tokens, text, torch.ones_like(mask)), expected)


def test_null_rows_read_the_null_embedding_and_nothing_of_their_caption() -> None:
    tokens, text, mask = _batch()
    model = _model()
    null_text = torch.tensor([False, True, False])
    mixed = model(tokens, text, mask, null_text=null_text)
    with_text, without = model(tokens, text, mask), model(tokens)
    torch.testing.assert_close(mixed[[0, 2]], with_text[[0, 2]])
    torch.testing.assert_close(mixed[1], without[1])
    model.null_embedding.weight.data.add_(torch.randn(1, 8))
    moved = model(tokens, text, mask, null_text=null_text)
    torch.testing.assert_close(moved[[0, 2]], with_text[[0, 2]])
    assert not torch.allclose(moved[1], without[1])


def test_caption_without_a_single_word_counts_as_no_text() -> None:
    tokens, text, mask = _batch()
    model = _model()
    mask[1] = False
    logits = model(tokens, text, mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1], model(tokens)[1])


def test_training_drops_captions_with_probability_cond_drop() -> None:
    _, text, mask = _batch()
    many = 400
    model = _model(cond_drop=0.3).train()
    tokens = torch.zeros(many, 6, dtype=torch.long)
    captions = (text[:1].expand(many, -1, -1), mask[:1].expand(many, -1))
    torch.manual_seed(0)
    first = model(tokens, *captions)[:, 0]
    is_null = (first - model.eval()(tokens[:1])[:, 0]).abs().amax(dim=1) < 1e-5
    assert float(is_null.float().mean()) == pytest.approx(0.3, abs=0.07)
    nobody = torch.zeros(many, dtype=torch.bool)
    given = model.train()(tokens, *captions, null_text=nobody)[:, 0]
    torch.testing.assert_close(given, given[:1].expand_as(given))


@pytest.mark.parametrize("text_width", [8, None])
@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient_in_every_kind_of_step(
    changes: dict[str, Any], text_width: int | None
) -> None:
    tokens, text, mask = _batch()
    model = _model(text_width=text_width, **changes).train()
    captions = (text, mask) if text_width else (None, None)
    for null_text in (torch.zeros(3).bool(), torch.ones(3).bool()):
        model.zero_grad()
        model(tokens, *captions, targets=tokens, null_text=null_text).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.null_embedding.weight.grad.any()


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    tokens, text, mask = _batch()
    model = _model()
    plain = functional.cross_entropy(model(tokens, text, mask).flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(model(tokens, text, mask, targets=tokens), plain)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("with_text", [True, False])
def test_decoding_with_the_cache_equals_the_full_forward(
    changes: dict[str, Any], with_text: bool
) -> None:
    tokens, text, mask = _batch()
    model = _model(**changes)
    captions = (text, mask) if with_text else (None, None)
    null_text = torch.tensor([False, True, False]) if with_text else None
    expected = model(tokens, *captions, null_text=null_text)
    state = model.start_decoding(*captions, null_text, max_batch=3)
    inputs = [None, *tokens[:, :-1].unbind(1)]
    decoded = torch.stack([model.decode_next(token, state) for token in inputs], dim=1)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)
    for given in range(1, 6):
        state = model.start_decoding(*captions, null_text, max_batch=3)
        after = [model.read_given(tokens[:, :given], state)]
        after += [model.decode_next(tokens[:, place], state) for place in range(given, 5)]
        read = torch.stack(after, dim=1)
        torch.testing.assert_close(read, expected[:, given:], atol=1e-4, rtol=0)


def test_text_is_projected_once_a_prompt_and_caches_stay_where_they_are() -> None:
    tokens, text, mask = _batch()
    model = _model()
    calls: list[int] = []
    for block in model.blocks:
        block.cross_attention.kv.register_forward_hook(lambda *_: calls.append(1))
    state = model.start_decoding(text, mask)
    places = [(b.image.keys.data_ptr(), b.image.values.data_ptr()) for b in state.blocks]
    for token in [None, *tokens[:, :-1].unbind(1)]:
        model.decode_next(token, state)
    assert len(calls) == len(model.blocks)
    assert [(b.image.keys.data_ptr(), b.image.values.data_ptr()) for b in state.blocks] == places


def test_dropout_acts_in_training_only() -> None:
    tokens, text, mask = _batch()
    model = _model(dropout=0.5)
    torch.testing.assert_close(model(tokens, text, mask), _model()(tokens, text, mask))
    model.train()
    nobody = torch.zeros(3).bool()
    first, second = (model(tokens, text, mask, null_text=nobody) for _ in range(2))
    assert not torch.allclose(first, second)


def test_pkeep_replaces_its_share_of_the_input_tokens_in_training_only() -> None:
    model = _model(pkeep=0.7)
    tokens = torch.randint(32, (2000, 6), generator=torch.Generator().manual_seed(1))
    read: list[Tensor] = []
    model.token_embedding.register_forward_hook(lambda _, args, out: read.append(args[0]))
    model.eval()(tokens)
    model.train()(tokens)
    assert torch.equal(read[0], tokens[:, :-1])
    # A random code is the right one in one of 32.
    kept = (read[1] == tokens[:, :-1]).float().mean()
    assert float(kept) == pytest.approx(0.7 + 0.3 / 32, abs=0.02)
    assert set(read[1].unique().tolist()) == set(range(32))


@torch.no_grad()
@pytest.mark.parametrize("hidden", [64, 512])
def test_head_starts_small_at_any_width_or_at_zero(hidden: int) -> None:
    torch.manual_seed(0)
    wide = dataclasses.replace(TINY, hidden=hidden, codebook_size=1024, zero_head=False)
    model, (tokens, text, mask) = LatentGPT(wide).eval(), _batch()
    assert float(model(tokens, text, mask).std()) == pytest.approx(0.25, rel=0.1)
    loss = model(tokens, text, mask, targets=tokens).item()
    assert loss == pytest.approx(math.log(1024), rel=0.01)
    assert not LatentGPT(dataclasses.replace(wide, zero_head=True)).head.weight.any()


def test_bf16_stays_bf16_with_a_float32_loss() -> None:
    tokens, text, mask = _batch()
    model = _model().bfloat16()
    assert model(tokens, text, mask).dtype == torch.bfloat16
    assert model(tokens, text, mask, targets=tokens).dtype == torch.float32
    state = model.start_decoding(text, mask)
    assert model.decode_next(None, state).dtype == torch.bfloat16


def test_every_parameter_is_read_inside_the_forward_of_its_own_module() -> None:
    """What ZeRO-3 relies on: each module's parameters exist only while its forward runs."""
    tokens, text, mask = _batch()
    model = _model(positions="learned")
    expected = model(tokens, text, mask)
    full = {name: p.data for name, p in model.named_parameters()}

    def release(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    def gather(module: torch.nn.Module, *_: Any) -> None:
        for name, parameter in model.named_parameters():
            if any(parameter is own for own in module.parameters(recurse=False)):
                parameter.data = full[name]

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, text, mask), expected)
        state = model.start_decoding(text, mask)
        torch.testing.assert_close(model.decode_next(None, state), expected[:, 0])
        torch.testing.assert_close(model.decode_next(tokens[:, 0], state), expected[:, 1])


def test_text_of_another_width_is_named() -> None:
    tokens, _, mask = _batch()
    with pytest.raises(ValueError, match="width 5, this model was built for 8"):
        _model()(tokens, torch.zeros(3, 4, 5), mask)
    with pytest.raises(ValueError, match="built for no text at all"):
        _model(text_width=None)(tokens, torch.zeros(3, 4, 8), mask)


def test_shapes_that_cannot_be_built_are_named() -> None:
    with pytest.raises(SettingsError, match=r"hidden \(16\) must be a multiple of .*heads \(3\)"):
        dataclasses.replace(TINY, heads=3)
    with pytest.raises(SettingsError, match="16 / 8 = 2"):
        dataclasses.replace(TINY, heads=8)


@pytest.mark.parametrize("changes", VARIANTS)
def test_folder_round_trip_is_exact(tmp_path: Path, changes: dict[str, Any]) -> None:
    tokens, text, mask = _batch()
    model = _model(attention="sdpa", **changes)
    model.save_pretrained(tmp_path)
    again = LatentGPT.from_pretrained(tmp_path)
    assert again.config == dataclasses.replace(model.config, attention="auto")
    assert not again.training
    assert torch.equal(again(tokens, text, mask), model(tokens, text, mask))


def test_folder_that_does_not_fit_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing.*lgpt convert"):
        LatentGPT.from_pretrained(tmp_path)
    _model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"layers": 3}, r"missing blocks\.2\."),
        ({"layers": 1}, r"unexpected blocks\.1\."),
        ({"mlp": "gelu"}, r"mlp\.up\.weight is \[128, 16\], the config asks for \[64, 16\]"),
        ({"depth": 3}, r"unknown fields \['depth'\]"),
        ({"model_type": "gpt2"}, "does not describe a LatentGPT"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(CheckpointError, match=message):
            LatentGPT.from_pretrained(tmp_path)
