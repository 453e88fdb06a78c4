"""`lgpt bench train`: its counts against torch's counter, its peers, and a real small run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lgpt.core.errors import OutOfMemoryError, SettingsError
from lgpt.engine.planned_model import planned_config
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.settings.run import load_run_settings
from lgpt.training import bench_train as bench
from lgpt.training.bench_peers import PEERS, PeerStep, build_peer, count_parameters

SMALL = LatentGPTConfig(64, 4, 4, 24, layers=2, hidden=32, heads=2, attention="sdpa")
FULL = LatentGPTConfig(16384, 16, 16, 512)


def test_model_flops_are_those_that_torch_counts() -> None:
    model = LatentGPT(SMALL)
    tokens, text = torch.randint(64, (3, 16)), torch.randn(3, 5, 24)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, text, targets=tokens).backward()
    # The plain kernel computes also what causal attention masks; we count half of its 16 x 16.
    masked = 3 * 4.0 * 3 * 32 * 2 * 16 * 16 / 2
    assert bench.model_flops(SMALL, 3, 5) == counter.get_total_flops() - masked


@pytest.mark.parametrize("name", PEERS)
def test_full_size_peers_have_our_parameters_within_three_percent(name: str) -> None:
    with torch.device("meta"):
        ours = LatentGPT(FULL).num_parameters()
        theirs = count_parameters(build_peer(name, FULL, ours))
    assert theirs == pytest.approx(ours, rel=0.03)


@pytest.mark.parametrize("name", PEERS)
def test_peers_learn_one_batch(name: str) -> None:
    torch.manual_seed(0)
    step = PeerStep(name, SMALL, 120_000, torch.device("cpu"))
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-2
    tokens, text = torch.randint(64, (2, 16)), step.text(2, 5, 24)
    losses = []
    for _ in range(15):
        loss = step.forward(tokens, text)
        step.backward(loss)
        step.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(64), rel=0.02)
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_peers_multiply_in_the_precision_of_the_run(name: str, precision: str) -> None:
    step = PeerStep(name, SMALL, 120_000, torch.device("cpu"), precision)
    head = step.model.output if name == "llamagen" else step.model.gpt2.lm_head
    seen: list[torch.dtype] = []
    head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.dtype))
    step.forward(torch.randint(64, (2, 16)), step.text(2, 5, 24))
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]


def test_peers_in_bf16_are_refused_where_it_is_emulated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "run.yaml", _config(tmp_path))
    run = load_run_settings(path, ["training.precision=bf16"], environ={})
    monkeypatch.setattr(bench, "multiplies_bf16", lambda device: device.type != "cpu")
    monkeypatch.setattr(bench, "device_of_this_rank", lambda: torch.device("cpu"))
    arguments = {"steps": 1, "rounds": 1, "words": 5, "memory_gib": None}
    with pytest.raises(SettingsError, match=r"--peers in bf16 .*training\.precision=fp32"):
        bench.bench_train(run, with_peers=True, find_micro_batch=False, **arguments)


def test_peer_that_cannot_be_as_small_says_so() -> None:
    with pytest.raises(SettingsError, match=r"llamagen cannot have 9,000 .*at least .*--peers"):
        build_peer("llamagen", SMALL, 9_000)


def test_the_micro_batch_that_fits_is_looked_for_with_the_runs_own_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "run.yaml", _config(tmp_path))
    run = load_run_settings(path, environ={})
    batches: list[tuple[int, int]] = []

    def measured(task: dict[str, Any]) -> dict[str, Any]:
        size, gib = task["micro_batch"], 2**30
        batches.append((size, task["deepspeed"]["train_batch_size"]))
        return {"peak_bytes": gib + size * gib // 4}

    monkeypatch.setattr(bench, "_measured", measured)
    monkeypatch.setattr(bench, "device_of_this_rank", lambda: torch.device("cpu"))
    base = bench._base_task(run, SMALL, 5, 2, tmp_path)
    largest, _ = bench._largest_micro_batch(run, base, memory_gib=9.0)  # 4.5 a rank
    assert largest == 13  # 4.25 GiB
    assert batches == [(1, 2), (2, 4), (4, 8), (8, 16), (12, 24), (13, 26)]
    monkeypatch.setattr(bench, "device_of_this_rank", lambda: torch.device("cuda"))
    assert bench._largest_micro_batch(run, base, memory_gib=4.5)[0] == 13  # each GPU has as much


def test_what_is_free_is_nine_tenths_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "device_of_this_rank", lambda: torch.device("cpu"))
    monkeypatch.setattr(bench, "available_bytes", lambda: 1000)
    assert bench._free_bytes() == 900
    monkeypatch.setattr(bench, "available_bytes", lambda: None)
    with pytest.raises(SettingsError, match="give --memory-gib"):
        bench._free_bytes()


def test_a_peer_that_does_not_fit_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny.write(tmp_path / "run.yaml", _config(tmp_path))
    run = load_run_settings(path, environ={})
    started: list[str] = []

    def run_ranks(command: list[str], ranks: int) -> tuple[list[int], list[str], list[str]]:
        what = json.loads(command[-1])["what"]
        started.append(what)
        if what == "gpt2":
            return [-9], [""], [""]  # the kernel's way
        assert Path(json.loads(command[-1])["cache"], "manifest.json").exists()
        parts = dict.fromkeys(bench.PARTS, 1.0 if what == "lgpt" else 3.0)
        told = {"parts": [parts], "peak_bytes": 2**30, "threads": 1, "seconds": 1, "dtype": "bf16"}
        told["words"] = [7]
        if what == "llamagen":  # as long as those that ours has read
            assert json.loads(command[-1])["words"] == 7
        return [0], [json.dumps(told)], [""]

    monkeypatch.setattr(bench, "run_ranks", run_ranks)
    arguments: dict[str, Any] = {"steps": 1, "rounds": 3, "words": 5, "memory_gib": None}
    result = bench.bench_train(run, with_peers=True, find_micro_batch=False, **arguments)
    assert started.count("gpt2") == 1
    assert result["model_flops"] == bench.model_flops(planned_config(run), 2, 7)
    assert started.count("llamagen") == started.count("lgpt") == 3
    assert result["did_not_fit"] == ["gpt2"]
    assert result["data_share"] == 0.25
    assert result["ratios"] == {"llamagen": {"images_per_second": 3.0, "peak_bytes": 1.0}}
    assert "gpt2 with 2 pictures did not fit" in caplog.text
    with (console := Console(width=200)).capture() as capture:
        console.print(bench.train_table(result))
    assert re.search(r"gpt2 .*did not fit", capture.get())


def test_products_run_on_as_many_ranks_at_once_as_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "run.yaml", _config(tmp_path))
    run = load_run_settings(path, environ={})
    seen: set[tuple[str, int]] = set()

    def run_ranks(command: list[str], ranks: int) -> tuple[list[int], list[str], list[str]]:
        what = json.loads(command[-1])["what"]
        seen.add((what, ranks))
        told = {"parts": [dict.fromkeys(bench.PARTS, 1.0)], "peak_bytes": 1, "threads": 1}
        told |= {"words": [5], "dtype": "bf16"}
        outs = [json.dumps({**told, "seconds": 1.0 + 2.0 * rank}) for rank in range(ranks)]
        return [0] * ranks, outs, [""] * ranks

    monkeypatch.setattr(bench, "run_ranks", run_ranks)
    arguments: dict[str, Any] = {"steps": 1, "rounds": 1, "words": 5, "memory_gib": None}
    arguments.update(with_peers=True, find_micro_batch=False)
    result = bench.bench_train(run, ranks=2, **arguments)
    assert seen == {("lgpt", 2), ("products", 2), ("llamagen", 1), ("gpt2", 1)}
    config = planned_config(run)
    # The mean of 1 and 3 seconds; a step takes 4.
    assert result["product_flops_per_second"] == bench._product_flops(config, 2) / 2
    model_rate = bench.model_flops(config, 2, 5) / 4
    assert result["model_flops_utilisation"] == pytest.approx(
        model_rate / result["product_flops_per_second"]
    )


def test_ours_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "run.yaml", _config(tmp_path))
    run = load_run_settings(path, environ={})
    monkeypatch.setattr(bench, "run_ranks", lambda *_: ([-9], [""], [""]))
    arguments: dict[str, Any] = {"steps": 1, "rounds": 1, "words": 5, "memory_gib": None}
    with pytest.raises(OutOfMemoryError, match=r"lgpt with 2 .*batch\.micro_batch_images="):
        bench.bench_train(run, with_peers=True, find_micro_batch=False, **arguments)


def _config(folder: Path) -> dict[str, Any]:
    vqvae = {"source": "custom", "checkpoint": "x", "codebook_size": 999, "downsample_factor": 4}
    transformer = {"layers": 8, "hidden": 64, "heads": 2}
    return tiny.transformer_run(folder, 4, vqvae=vqvae, transformer=transformer)


@pytest.mark.slow
def test_a_real_run_beside_its_peers(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "run.yaml", _config(tmp_path))
    run = load_run_settings(path, ["deepspeed=zero2_bf16"], environ={})
    result = bench.bench_train(
        run,
        steps=2,
        rounds=1,
        words=5,
        with_peers=True,
        find_micro_batch=False,
        memory_gib=None,
    )
    assert set(result["contestants"]) == {"lgpt", *PEERS}
    for one in result["contestants"].values():
        parts = sum(one[f"{part}_seconds"] for part in ("data", "forward", "backward", "optimizer"))
        assert parts == pytest.approx(one["step_seconds"], rel=0.5)
        assert one["images_per_second"] == pytest.approx(2 / one["step_seconds"])
        assert one["peak_bytes"] > 2**26
    assert 0 < result["model_flops_utilisation"] < 1
    assert result["product_dtype"] == "float32"
    assert result["data_source"] == "a temporary cache of random latents"
    assert result["words_read"] == 5
    assert 0 < result["data_share"] < 0.5
    assert set(result["ratios"]) == set(PEERS)
    assert bench.train_table(result).row_count == 3


@pytest.mark.slow
def test_two_ranks_are_measured_with_what_they_send(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "run.yaml", _config(tmp_path))
    run = load_run_settings(path, ["deepspeed=zero2_bf16"], environ={})
    arguments = {"steps": 1, "rounds": 1, "words": 5, "with_peers": False}
    arguments.update(find_micro_batch=False, memory_gib=None)
    result = bench.bench_train(run, ranks=2, **arguments)
    ours = result["contestants"]["lgpt"]
    assert ours["images_per_second"] == pytest.approx(4 / ours["step_seconds"])
    assert 0 < ours["communication_seconds"] < 100 * ours["step_seconds"]
    assert "on each of 2 ranks" in str(bench.train_table(result).title)
