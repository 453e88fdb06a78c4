"""`lgpt bench sample` on tiny models: what it reports, and that the peers are what they say."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lgpt.cli import app
from lgpt.core.errors import SettingsError
from lgpt.engine.memory import forget_peak, peak_bytes
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.sampling import bench_sample
from lgpt.sampling.bench_peers import (
    Gpt2Sampler,
    LlamaGenSampler,
    closest_width,
    gpt2_parameters,
    llamagen_parameters,
)

TINY = [
    "demo/phase3_shapes",
    "vqvae.codebook_size=64",
    "vqvae.downsample_factor=4",
    "data.resolution=16",
    "transformer.layers=2",
    "transformer.hidden=64",
    "transformer.heads=4",
    "transformer.mlp_hidden=128",
]
FULL = LatentGPTConfig(16384, 16, 16, 512)


def bench(*words: Any) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["bench", "sample", *TINY, *map(str, words), "--json"])
    if done.exception is not None:
        raise done.exception
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_all_three_draw_and_their_rates_are_compared() -> None:
    result = bench("--batch", 1, "--batch", 3, "--rounds", 2, "--words", 5)
    assert [measured["batch"] for measured in result["batches"]] == [1, 3]
    assert result["tokens_per_image"] == result["tokens_drawn"] == 16
    assert result["parameters"].keys() == result["batches"][0]["tokens_per_second"].keys()
    for measured in result["batches"]:
        ours, *theirs = measured["tokens_per_second_of_rounds"].values()
        for name, rates in zip(measured["ratios"], theirs):
            ratios = sorted(a / b for a, b in zip(ours, rates))
            assert measured["ratios"][name] == pytest.approx(sum(ratios) / 2)
        for name, rate in measured["tokens_per_second"].items():
            assert measured["images_per_second"][name] == pytest.approx(rate / 16)
        bound = measured["read_bytes_per_second"] / measured["bytes_per_step"] * measured["batch"]
        assert measured["bound_tokens_per_second"] == pytest.approx(bound)
        assert 0 < measured["bandwidth_share"] < 1


def test_a_step_reads_all_weights_but_the_embedding_and_the_filled_caches() -> None:
    result = bench("--batch", 2, "--rounds", 1, "--tokens", 6, "--words", 5, "--no-peers")
    assert (result["tokens_drawn"], list(result["parameters"])) == (6, ["lgpt"])
    matrices = 2 * (4 * 64**2 + 2 * 64**2 + 3 * 64 * 128) + 64 * 64
    bytes_a_number = {"float32": 4, "bfloat16": 2}[result["dtype"]]
    # 2 pictures, keys and values of 2 layers; 13 places on average of either half, 5 words and null
    # of the one with text, null of the other.
    caches = 2 * 2 * 2 * 64 * (2 * (16 - 3) + (5 + 1) + 1) * bytes_a_number
    (measured,) = result["batches"]
    few = 2000 * bytes_a_number  # norms, start and null
    assert 0 < measured["bytes_per_step"] - matrices * bytes_a_number - caches < few


def test_8_bit_weights_are_one_more_contestant_with_a_bound_of_its_own() -> None:
    result = bench("--batch", 1, "--rounds", 2, "--words", 5, "--no-peers", "--int8")
    (measured,) = result["batches"]
    assert list(measured["ratios"]) == ["lgpt, 8-bit weights"]
    ours, int8 = measured["tokens_per_second_of_rounds"].values()
    slower = sum(a / b for a, b in zip(ours, int8)) / 2
    assert measured["ratios"]["lgpt, 8-bit weights"] == pytest.approx(slower)
    matrices = 2 * (4 * 64**2 + 2 * 64**2 + 3 * 64 * 128) + 64 * 64
    caches = 2 * 2 * 64 * (2 * (16 - 8) + (5 + 1) + 1) * 2  # kept in bf16
    assert 0 < measured["int8"]["bytes_per_step"] - matrices - caches < 2000
    assert 0 < measured["int8"]["bandwidth_share"] < 1


def test_an_unconditional_model_draws_alone_one_row_a_picture() -> None:
    without_text = "conditioning=unconditional"
    result = bench(without_text, "--batch", 3, "--rounds", 1, "--words", 5)
    assert (result["guidance"], result["text_tokens"]) == (1.0, 0)
    assert list(result["parameters"]) == ["lgpt"]
    assert result["left_out"] == ["LlamaGen's sampler", "transformers' GPT2"]
    assert "without LlamaGen's sampler and" in str(bench_sample.sample_table(result).caption)
    matrices = 2 * (4 * 64**2 + 2 * 64**2 + 3 * 64 * 128) + 64 * 64
    bytes_a_number = {"float32": 4, "bfloat16": 2}[result["dtype"]]
    caches = 3 * 2 * 2 * 64 * ((16 - 8) + 1) * bytes_a_number  # half full on average, and null
    (measured,) = result["batches"]
    few = 2000 * bytes_a_number
    assert 0 < measured["bytes_per_step"] - matrices * bytes_a_number - caches < few
    assert bench(without_text, "--batch", 1, "--rounds", 1, "--no-peers")["left_out"] == []


def test_without_text_the_decoder_gets_as_many_rows_as_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    decode = LatentGPT.decode_next

    def seen(self: LatentGPT, tokens: Any, state: Any) -> torch.Tensor:
        logits = decode(self, tokens, state)
        rows.append(len(logits))
        return logits

    monkeypatch.setattr(LatentGPT, "decode_next", seen)
    bench("--batch", 3, "--rounds", 1, "--no-peers")
    assert set(rows) == {6}
    rows.clear()
    bench("conditioning=unconditional", "--batch", 3, "--rounds", 1)
    assert set(rows) == {3}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux's /proc")
def test_the_peak_is_of_ours_alone_and_not_of_what_was_or_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Large(LlamaGenSampler):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words)
            self.kept = torch.ones(100 * 2**20)  # 400 MiB

    assert forget_peak(torch.device("cpu"))
    in_use = peak_bytes(torch.device("cpu"))
    torch.ones(100 * 2**20)
    monkeypatch.setattr(bench_sample, "LlamaGenSampler", Large)
    result = bench("--batch", 1, "--batch", 256, "--rounds", 1)
    few, many = (measured["peak_bytes"] for measured in result["batches"])
    keys_and_values = 2 * 256 * 16 * 2 * 2 * 64 * 2  # of 256 pictures in bf16
    assert few + keys_and_values < many < in_use + 350 * 2**20


def test_where_a_peak_cannot_be_had_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sample, "forget_peak", lambda device: False)
    result = bench("--batch", 1, "--rounds", 1, "--no-peers")
    assert result["batches"][0]["peak_bytes"] is None
    assert list(bench_sample.sample_table(result).columns[-1].cells) == [""]


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(SettingsError, match="--tokens 17 must lie between 2 and 16"):
        bench("--tokens", 17)


def test_the_peers_have_the_published_sizes_and_ours() -> None:
    # LlamaGen's GPT-L for text, whose captions are T5's of width 2048, has 345.0M parameters.
    t5 = LatentGPTConfig(16384, 16, 16, 2048)
    assert llamagen_parameters(t5, 1024, multiple=256) == pytest.approx(345.0e6, rel=3e-3)
    assert gpt2_parameters(FULL, 1024) == pytest.approx(420e6, rel=1e-2)
    for count, step in ((llamagen_parameters, 64), (gpt2_parameters, 16)):
        width = closest_width(511_788_032, lambda w, count=count: count(FULL, w), step)
        assert count(FULL, width) == pytest.approx(511_788_032, rel=0.03)
    small = LatentGPTConfig(64, 4, 4, 8, layers=2, hidden=64, heads=4)
    for kind, count in ((LlamaGenSampler, llamagen_parameters), (Gpt2Sampler, gpt2_parameters)):
        peer = kind(small, 200_000, torch.device("cpu"), torch.float32)
        assert peer.parameters_count == pytest.approx(count(small, peer.width), rel=0.03)


def test_the_transcription_decodes_what_it_would_compute_at_once() -> None:
    torch.manual_seed(0)
    config = LatentGPTConfig(64, 4, 4, 8, layers=2, hidden=64, heads=4)
    peer = LlamaGenSampler(config, 200_000, torch.device("cpu"), torch.float32).eval()
    text, given = torch.randn(1, 5, 8), torch.randint(64, (1, 11))
    seen: list[torch.Tensor] = []
    peer.output.register_forward_hook(lambda module, inputs, out: seen.append(out[:, -1]))
    drawn: list[torch.Tensor] = []
    peer.tok_embeddings.register_forward_hook(lambda module, inputs, out: drawn.append(inputs[0]))
    stamps = peer.draw(text, given, guidance=3.0, temperature=1.0, top_k=5)
    assert len(stamps) == len(seen) == 5
    tokens = torch.cat([given, *(t[:1] for t in drawn[1:5])], dim=1)
    step_by_step = seen.pop()
    seen.clear()
    peer.draw(text, tokens, guidance=3.0, temperature=1.0, top_k=5)
    torch.testing.assert_close(seen[0], step_by_step)
