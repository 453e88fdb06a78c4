"""The whole way, as a user walks it: real commands, two gloo ranks a training, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

BIN = Path(sys.executable).parent
PROMPTS = ["a red circle", "a blue square"]
pytestmark = pytest.mark.slow


def _environment() -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}


def _run(*words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in words],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expect, (
        f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    )
    return done


def _lgpt(*words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, "-m", "lgpt", *words, expect=expect)


def _deepspeed(config: Path) -> list[str]:
    return [*tiny.launcher(), "--module", "lgpt", "train", str(config)]


def _metrics(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phases")


@pytest.fixture(scope="module")
def phase2(home: Path) -> Path:
    config = tiny.vqvae_run(home, 8, training={**tiny.training(8, "bf16"), "sample_every": 8})
    _run(*_deepspeed(tiny.write(home / "phase2.yaml", config)))
    return home / "runs" / "tiny-phase2"


@pytest.fixture(scope="module")
def phase1(home: Path, phase2: Path) -> Path:
    _lgpt("vqvae", "export-taming", phase2, phase2 / "taming")
    config = tiny.transformer_run(
        home,
        6,
        phase=1,
        name="tiny-phase1",
        training={**tiny.training(6, "bf16"), "sample_every": 6},
        vqvae={"source": "pretrained_taming", "checkpoint": str(phase2 / "taming")},
        latent_cache=str(home / "latents-phase1"),
        sampling={"images": 4},
    )
    path = tiny.write(home / "phase1.yaml", config)
    _lgpt("prepare", path)
    _run(*_deepspeed(path))
    return home / "runs" / "tiny-phase1"


@pytest.fixture(scope="module")
def phase3(home: Path, phase2: Path, phase1: Path) -> Path:
    """Trained under ZeRO-3, stopped once by SIGTERM to a rank on the way, and gone on with."""
    steps = 30
    config = tiny.transformer_run(
        home,
        steps,
        vqvae={"source": "custom", "checkpoint": str(phase2)},
        latent_cache=str(home / "latents-phase3"),
        training={**tiny.training(steps, "bf16"), "sample_every": steps},
        sampling={"images": 4, "prompts": PROMPTS},
        checkpoint={"every_steps": 1000},
        init_from=str(phase1 / "checkpoints" / "step_4"),
    )
    path = tiny.write(home / "phase3.yaml", config)
    _lgpt("prepare", path)
    _stop_on_the_way(path, home / "runs" / "tiny-phase3")
    _run(*_deepspeed(path))
    return home / "runs" / "tiny-phase3"


def _stop_on_the_way(config: Path, run_folder: Path) -> None:
    log = config.parent / "stopped.log"
    with log.open("w") as stream:
        launcher = subprocess.Popen(
            _deepspeed(config), env=_environment(), stdout=stream, stderr=stream
        )
    deadline = time.monotonic() + 200
    while not (run_folder / "metrics.jsonl").exists():
        assert launcher.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, "no metrics came"
        time.sleep(0.05)
    ranks = [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and _is_rank(folder, config)
    ]
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGTERM)  # one rank is told: all must stop at the same step
    assert launcher.wait(timeout=120) == 75, log.read_text()[-4000:]


def _is_rank(process: Path, config: Path) -> bool:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(config).encode() in words and any(w.startswith(b"--local_rank=") for w in words)


def test_phase3_started_on_the_chosen_step_of_phase1(phase3: Path, phase1: Path):
    told = json.loads((phase3 / "warm_start.json").read_text())
    assert (phase1 / "checkpoints" / "latest").read_text().strip() == "step_6"
    assert told["source"] == str(phase1 / "checkpoints" / "step_4" / "model")
    assert (told["step"], told["differences"], told["is_same_vqvae"]) == (4, {}, True)
    kept = phase3 / "checkpoints" / "step_30" / "warm_start.json"
    assert json.loads(kept.read_text()) == told


def test_the_logits_of_conversions_are_those_of_the_training(phase3: Path, tmp_path: Path):
    """Of a ZeRO-3 training in bf16: run in bf16 again, and once from rounded weights."""
    done = _lgpt("convert", "--verify", phase3, tmp_path / "model")
    told = json.loads((tmp_path / "model" / "export.json").read_text())["logits_check"]
    assert told["precision"] == "bf16"
    assert told["count"] == 2 * 8 * 32
    assert told["largest_difference"] <= 0.02 * told["largest_logit"]
    assert f"largest difference of logits: {told['largest_difference']:.6g}" in done.stdout


def test_the_grid_drawn_under_zero_3_is_the_converted_models(phase3: Path, tmp_path: Path):
    """Two pictures on each rank, drawn through blocks that are gathered one after the other."""
    from lgpt import LatentGPT, TextToImagePipeline, load_vqvae
    from lgpt.engine.start import Float32Products, multiplies_bf16
    from lgpt.sampling.picture_grid import picture_grid

    _lgpt("convert", phase3, tmp_path / "model")
    model = LatentGPT.from_pretrained(tmp_path / "model").bfloat16()
    parts = json.loads((tmp_path / "model" / "pipeline.json").read_text())
    vqvae = load_vqvae("custom", str(tmp_path / "model" / "vqvae"))
    pipeline = TextToImagePipeline(
        model, vqvae, tmp_path / "model" / parts["text_encoder"], parts["sampling"]
    )
    is_bf16 = multiplies_bf16(torch.device("cpu"))
    with contextlib.nullcontext() if is_bf16 else Float32Products():  # as training computes
        pictures = [p for rank in (0, 1) for p in pipeline(PROMPTS, seed=[2 * rank, 2 * rank + 1])]
    assert pictures[0].tobytes() != pictures[2].tobytes(), "seeds make no difference"
    with Image.open(phase3 / "samples" / "step_0000030_samples.png") as drawn:
        expected = picture_grid(pictures, PROMPTS * 2)
        assert drawn.size == expected.size
        # 2: pictures decoded side by side are rounded otherwise.
        assert max(high for _, high in ImageChops.difference(drawn, expected).getextrema()) <= 2


def test_phase2_leaves_a_vqvae_and_reconstructions(phase2: Path):
    done = json.loads((phase2 / "DONE").read_text())
    assert done["step"] == 8
    assert 0 < done["val_codebook_usage"] <= 1
    losses = [line["recon_loss"] for line in _metrics(phase2) if "recon_loss" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    with Image.open(next((phase2 / "samples").glob("*reconstructions.png"))) as grid:
        assert min(grid.size) > 16
    weights = load_file(phase2 / "model" / "model.safetensors")
    assert weights["encoder.conv_in.weight"].dtype == torch.float32


def test_phase1_trains_on_the_vqvae_read_back_from_taming_files(phase1: Path, phase2: Path):
    from lgpt import load_vqvae

    ours = load_vqvae("custom", str(phase2))
    theirs = load_vqvae("pretrained_taming", str(phase2 / "taming"))
    assert ours.weights_digest() == theirs.weights_digest()
    assert json.loads((phase1 / "DONE").read_text())["step"] == 6
    record = _metrics(phase1)[0]
    for name in ("ce_loss", "perplexity", "learning_rate", "gradient_norm", "tokens_per_second"):
        assert name in record


def test_a_stopped_run_goes_on_with_the_same_steps(phase3: Path):
    steps = [line["step"] for line in _metrics(phase3) if "ce_loss" in line]
    assert steps == list(range(1, 31)), "a step is missing or was done twice"


def test_a_second_start_finds_nothing_to_do(phase3: Path, home: Path):
    before = (phase3 / "metrics.jsonl").read_bytes()
    done = _lgpt("train", home / "phase3.yaml")
    assert "nothing to train" in done.stderr
    assert (phase3 / "metrics.jsonl").read_bytes() == before


def test_converted_model_draws_the_same_pictures_twice(phase3: Path, home: Path):
    model = home / "model"
    _lgpt("convert", phase3, model)
    for name in ("a.png", "b.png"):
        words = ["--prompt", "a red circle", "--prompt", "a blue square", "--seed", "3"]
        _lgpt("sample", model, *words, "--out", home / name)
    assert (home / "a.png").read_bytes() == (home / "b.png").read_bytes()
    assert "random" in (model / "README.md").read_text().lower()
    _lgpt("sample", model, "--unconditional", 2, "--out", home / "free")
    assert len(list((home / "free").glob("*.png"))) == 2


def test_another_vqvae_makes_the_cache_unusable(phase3: Path, phase1: Path, home: Path):
    """The cache of phase 1 came from the same pictures but its fingerprint names other files."""
    words = [f"latent_cache={home / 'latents-phase1'}", "name=other", "data.shapes.train_images=40"]
    done = _lgpt("train", home / "phase3.yaml", *words, expect=3)
    assert "dataset" in done.stderr
    assert "lgpt prepare" in done.stderr


def test_report_and_mlflow_know_all_runs(phase1: Path, phase2: Path, phase3: Path, home: Path):
    done = _lgpt("report", phase2, phase1, phase3, "--json")
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert [run["phase"] for run in runs] == [2, 1, 3]
    assert all(run["is_done"] and run["validation_loss"] is not None for run in runs)
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home / 'runs' / 'mlflow.db'}")
    names = {experiment.name for experiment in client.search_experiments()}
    assert names >= {"vqvae-training", "latent-gpt-pretrained-vqvae", "latent-gpt-custom-vqvae"}
    experiment = client.get_experiment_by_name("latent-gpt-custom-vqvae")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["phase"] == "3"
    assert run.data.tags["vqvae_source"] == "custom"
    assert run.data.metrics["ce_loss"] > 0


def test_a_diverged_run_says_so_and_trains_with_a_lower_learning_rate(home: Path):
    config = tiny.vqvae_run(
        home, 8, name="diverging", optimizer={"learning_rate": 1e30, "gradient_clipping": 0.0}
    )
    path = tiny.write(home / "diverging.yaml", {**config, "checkpoint": {"every_steps": 1}})
    done = _lgpt("train", path, expect=4)
    assert "is not finite at step" in done.stderr
    assert "optimizer.learning_rate (now 1e+30)" in done.stderr
    assert "set aside as .diverged_step_1" in done.stderr
    assert "Traceback" not in done.stderr
    folder = home / "runs" / "diverging"
    assert not (folder / "DONE").exists()
    _lgpt("train", path, "optimizer.learning_rate=1e-3")
    assert json.loads((folder / "DONE").read_text())["step"] == 8


def test_a_wrong_config_is_told_once_by_all_ranks(home: Path):
    path = tiny.write(home / "wrong.yaml", tiny.vqvae_run(home, 8, nam="x", seed=-1))
    done = _run(*_deepspeed(path), "batch.global_batch_images=7", expect=2)
    text = done.stdout + done.stderr
    assert text.count("3 problems") == 1
    batch = "global_batch_images (7, command line)"
    for part in ("nam", "did you mean name", "seed", batch, "4 or 8"):
        assert part in text
    assert not (home / "runs" / "wrong").exists()
