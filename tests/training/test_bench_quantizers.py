"""`lgpt bench quantizers`: every quantizer gets the same time, and Ctrl-C loses nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_bench_vqvae import SMALL

from lgpt.core.errors import SettingsError
from lgpt.models.vqvae import VQVAE, VQVAEConfig
from lgpt.settings.phases import Phase2
from lgpt.settings.run import load_run_settings
from lgpt.training.bench_quantizers import QUANTIZERS, bench_quantizers, with_quantizer

CONFIG = "demo/phase2_openmoji_f8"


def small_run(*words: str) -> Phase2:
    run = load_run_settings(CONFIG, [*SMALL, *words], environ={})
    assert isinstance(run, Phase2)
    return run


def command(*words: object) -> list[str]:
    base = [sys.executable, "-m", "lgpt", "bench", "quantizers", CONFIG, *SMALL]
    return [*base, *map(str, words), "--json"]


@pytest.mark.slow
def test_every_quantizer_is_measured_for_equal_time_and_drawn(tmp_path: Path):
    plot = tmp_path / "curves.png"
    words = ("--minutes", 0.005, "--measurements", 2, "--plot", plot)
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(plot.with_suffix(".json").read_text()) == result
    assert set(result["curves"]) == set(QUANTIZERS)
    for curve in result["curves"].values():
        assert curve[-1]["seconds"] >= 0.3
        # A step more than the others' time at most.
        assert curve[-1]["seconds"] - curve[-1]["seconds"] / curve[-1]["steps"] < 1.5
        assert all(0 < point["codebook_usage"] <= 1 for point in curve)
    assert result["training_images"] == 24
    with Image.open(plot) as picture:
        assert picture.width > 1000


@pytest.mark.slow
def test_ctrl_c_prints_and_draws_what_there_is(tmp_path: Path):
    plot = tmp_path / "curves.png"
    words = ("--minutes", 5, "--measurements", 3000, "--quantizer", "unit_ema", "--plot", plot)
    running = subprocess.Popen(command(*words), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not plot.with_suffix(".json").exists():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    result = json.loads(out.splitlines()[-1])
    assert result["was_interrupted"] is True
    assert result["results"]["unit_ema"]["steps"] >= 1
    assert plot.exists()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_is_what_its_name_says(name: str):
    run = with_quantizer(small_run(), name)
    model = VQVAE(VQVAEConfig.from_settings(run.vqvae)).train()
    learns_by_gradients = "gradient" in name
    with torch.no_grad():
        output = model(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert model.quantize.embedding.weight.requires_grad is learns_by_gradients
    assert (float(output.codebook_loss) > 0) is learns_by_gradients
    if name.startswith("unit"):
        codes = model.quantize.lookup(output.tokens)
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(codes[:, 0].shape))
        assert codes.shape[1] == 8
    assert (run.loss.entropy_weight > 0) is name.endswith("entropy")
    assert not run.health.respond, "restarts by the health monitor are no part of a quantizer"


def test_unknown_quantizers_and_trained_codebooks_are_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match="no quantizer 'lfq'; there are: gradient, ema"):
        bench_quantizers(small_run(), minutes=1.0, measurements=1, names=("lfq",))
    with pytest.raises(SettingsError, match="init_from brings a codebook"):
        bench_quantizers(small_run(f"init_from={tmp_path}"), minutes=1.0, measurements=1)
