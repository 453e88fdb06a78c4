"""`lgpt bench quantizers`: one phase 2 config with every quantizer, at equal time.

Encoder, decoder, pictures, their order and the seed are the same; whoever has used least of its
time goes next, so a machine that others use as well slows all. On a CPU the time is the process's
own (what other processes take does not count), on a GPU the clock's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from rich.table import Table

from lgpt.core.errors import SettingsError
from lgpt.core.files import write_text_atomically
from lgpt.data.progress import progress
from lgpt.engine.start import afford_bf16, start_process_group
from lgpt.settings.phases import Phase2
from lgpt.training.bench_recipe import OurTrainer, with_steps

# What of `vqvae` and `loss` makes each quantizer; code_dim None stands for z_channels.
QUANTIZERS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    # Esser et al. 2021 (taming-transformers): wide codes that learn by gradients.
    "gradient": (
        {"codebook_update": "gradient", "l2_normalized_codes": False, "code_dim": None},
        {"entropy_weight": 0.0},
    ),
    # Razavi et al. 2019 (VQ-VAE-2) with restarts of dead codes (Dhariwal et al. 2020, Jukebox).
    "ema": (
        {"codebook_update": "ema", "l2_normalized_codes": False, "code_dim": None},
        {"entropy_weight": 0.0},
    ),
    # Yu et al. 2022 (ViT-VQGAN) and Sun et al. 2024 (LlamaGen): unit length, 8 wide.
    "unit_gradient": (
        {"codebook_update": "gradient", "l2_normalized_codes": True, "code_dim": 8},
        {"entropy_weight": 0.0},
    ),
    # The regulariser of Shi et al. 2024 (IBQ) with its weight.
    "unit_gradient_entropy": (
        {"codebook_update": "gradient", "l2_normalized_codes": True, "code_dim": 8},
        {"entropy_weight": 0.05},
    ),
    "unit_ema": (
        {"codebook_update": "ema", "l2_normalized_codes": True, "code_dim": 8},
        {"entropy_weight": 0.0},
    ),
}


def with_quantizer(run: Phase2, name: str) -> Phase2:
    """The run with this quantizer of `QUANTIZERS`."""
    vqvae, loss = QUANTIZERS[name]
    wanted = {**vqvae, "code_dim": vqvae["code_dim"] or run.vqvae.z_channels}
    return run.model_copy(
        update={
            "vqvae": run.vqvae.model_copy(update=wanted),
            "loss": run.loss.model_copy(update=dict(loss)),
            # What is measured here needs no networks.
            "metrics": run.metrics.model_copy(update={"lpips": "none", "rfid": "none"}),
            # Each as it is: the response to a collapse would restart every quantizer's codes.
            "health": run.health.model_copy(update={"respond": False}),
        }
    )


def bench_quantizers(
    run: Phase2,
    *,
    minutes: float,
    measurements: int,
    names: tuple[str, ...] = tuple(QUANTIZERS),
    out: Optional[Path] = None,
) -> dict[str, Any]:
    """Train with each quantizer and measure on the validation pictures on the way.

    Ctrl-C ends it early, with what there is.

    Args:
        run: All but its quantizer; `training.max_steps` counts for the learning rate, and
            `training.max_minutes` is not used.
        minutes: Of training, each.
        measurements: So often each is measured.
        names: Keys of `QUANTIZERS`.
        out: A JSON file that gets the result so far after every measurement.

    Returns:
        JSON values. `curves` has, by name, one record a measurement: steps, seconds,
        images_per_second, psnr_db, codebook_usage and perplexity over all validation pictures, and
        window_usage of the last 65,536 training tokens; `results` the last of each.

    Raises:
        SettingsError: There is no such quantizer, or the run starts from a trained VQ-VAE.
    """
    if unknown := [name for name in names if name not in QUANTIZERS]:
        raise SettingsError(f"no quantizer {unknown[0]!r}; there are: {', '.join(QUANTIZERS)}.")
    if run.init_from is not None:
        raise SettingsError("init_from brings a codebook of its own; leave it out to compare.")
    device = start_process_group()
    if run.training.precision == "bf16":
        afford_bf16(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    budget = 60.0 * minutes
    run = with_steps(run, run.training.max_steps)
    trainers = {
        name: OurTrainer(with_quantizer(run, name), device, clock, budget) for name in names
    }
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    result = _described(run, device, trainers, minutes)
    title = f"bench quantizers, {len(names)} of them"
    try:
        with progress(title, round(budget * len(names)), unit="s", is_shown=True) as advance:
            _train_in_turns(
                trainers, curves, budget, measurements, advance, lambda: _keep(result, curves, out)
            )
    except KeyboardInterrupt:
        result["was_interrupted"] = True
        for name, trainer in trainers.items():
            curves[name].append(_measured(trainer))
    return _keep(result, curves, out)


def _train_in_turns(
    trainers: Mapping[str, OurTrainer],
    curves: dict[str, list[dict[str, Any]]],
    budget: float,
    measurements: int,
    advance: Callable[[int], None],
    keep: Callable[[], Any],
) -> None:
    told = 0.0
    while True:
        name, trainer = min(trainers.items(), key=lambda each: each[1].seconds)
        if trainer.seconds >= budget:
            return
        trainer.step()
        if trainer.seconds >= budget * (len(curves[name]) + 1) / measurements:
            curves[name].append(_measured(trainer))
            keep()
        spent = sum(min(each.seconds, budget) for each in trainers.values())
        advance(int(spent) - int(told))
        told = spent


def _measured(trainer: OurTrainer) -> dict[str, Any]:
    images = trainer.steps * trainer.run.batch.global_batch_images
    rate = images / trainer.seconds if trainer.seconds else 0.0
    return {**trainer.measure(), "images_per_second": rate}


def _described(
    run: Phase2, device: torch.device, trainers: Mapping[str, OurTrainer], minutes: float
) -> dict[str, Any]:
    first = next(iter(trainers.values()))
    return {
        "run": run.name,
        "dataset": run.data.dataset,
        "resolution": run.data.resolution,
        "downsample_factor": run.vqvae.downsample_factor,
        "codebook_size": run.vqvae.codebook_size,
        "batch_images": run.batch.global_batch_images,
        "training_images": first.task.training_images,
        "validation_images": len(first.task.val_images),
        "seed": run.seed,
        "minutes": minutes,
        "clock": "process" if device.type == "cpu" else "wall",
        "device": device.type,
        "threads": torch.get_num_threads(),
        "was_interrupted": False,
    }


def _keep(
    result: dict[str, Any], curves: dict[str, list[dict[str, Any]]], out: Optional[Path]
) -> dict[str, Any]:
    result["curves"] = curves
    result["results"] = {name: curve[-1] for name, curve in curves.items() if curve}
    if out is not None:
        write_text_atomically(out, json.dumps(result, indent=1))
    return result


def quantizer_table(result: dict[str, Any]) -> Table:
    """The last measurement of every quantizer, the best PSNR first."""
    table = Table(
        title=f"{result['codebook_size']:,} codes on {result['dataset']} at "
        f"{result['resolution']}, f={result['downsample_factor']}, {result['minutes']:g} min each"
    )
    for name in ("quantizer", "steps", "PSNR dB", "usage", "window", "perplexity", "images/s"):
        table.add_column(name, justify="left" if name == "quantizer" else "right")
    for name, row in sorted(result["results"].items(), key=lambda each: -each[1]["psnr_db"]):
        table.add_row(
            name,
            f"{row['steps']:,}",
            f"{row['psnr_db']:.2f}",
            f"{row['codebook_usage']:.1%}",
            f"{row['window_usage']:.1%}",
            f"{row['perplexity']:.0f}",
            f"{row['images_per_second']:.1f}",
        )
    return table


def plot_quantizers(result: dict[str, Any], out: Path) -> None:
    """Usage of the codebook and PSNR over training time, a line a quantizer, as a PNG.

    Usage is drawn twice, because few validation pictures cannot use a large codebook: 235 of 64
    tokens are 92% of 16,384 codes at most.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for name, curve in result["curves"].items():
        seconds = [point["seconds"] for point in curve]
        (line,) = axes[1].plot(seconds, [point["psnr_db"] for point in curve], label=name)
        for key, dashes in (("window_usage", "-"), ("codebook_usage", ":")):
            usage = [100 * point[key] for point in curve]
            axes[0].plot(seconds, usage, dashes, color=line.get_color())
    axes[0].plot([], [], "-", color="gray", label="last 65,536 training tokens")
    axes[0].plot([], [], ":", color="gray", label="validation pictures")
    axes[0].set(ylabel="codes used, %", ylim=(0, 102))
    axes[0].legend(frameon=False)
    axes[1].set(ylabel="PSNR of the validation pictures, dB")
    for axis in axes:
        axis.set_xlabel(f"seconds of training ({result['clock']} time)")
        axis.grid(alpha=0.3)
    axes[1].legend(frameon=False)
    figure.suptitle(
        f"{result['codebook_size']:,} codes, {result['dataset']} at {result['resolution']}, "
        f"f={result['downsample_factor']}"
    )
    figure.savefig(out, dpi=110)
