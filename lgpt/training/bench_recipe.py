"""`lgpt bench vqvae`: a phase 2 config against LlamaGen's recipe in plain PyTorch.

Both train the same encoder and decoder on the same pictures in one process, a step at a time:
whoever has used less time goes next, so a machine that others use as well slows both. Ours is what
`lgpt train` runs (task, DeepSpeed engine, schedule); theirs is `bench_llamagen.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor, nn

from lgpt.core.distributed import seed_everything
from lgpt.data.image_batches import ImageBatches
from lgpt.data.progress import progress
from lgpt.data.transforms import to_unit_range
from lgpt.engine.build import set_learning_rate
from lgpt.engine.start import afford_bf16, start_process_group
from lgpt.evaluation.picture_metrics import code_perplexity, code_usage, psnr_decibels
from lgpt.models.quantizer import Quantized
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.phases import Phase2
from lgpt.training.bench_llamagen import LlamagenLoop
from lgpt.training.schedule import learning_rate_at
from lgpt.training.train_vqvae import VqvaeTask

Reconstruct = Callable[[Float[Tensor, "b 3 H W"]], tuple[Tensor, Tensor]]

# LlamaGen reports the usage of this many training tokens.
_WINDOW_TOKENS = 65_536
_IMAGES_PER_CALL = 16


def bench_recipe(run: Phase2, *, steps: int, measurements: int) -> dict[str, Any]:
    """Train both and measure them on the validation pictures.

    Args:
        run: Ours. Its batch and its pictures are both contenders'; `training.max_steps` becomes
            `steps`, `training.max_minutes` is not used.
        steps: Optimizer steps of ours.
        measurements: So often both are measured on the way.

    Returns:
        JSON values. `ours`, `llamagen_at_equal_steps` and `llamagen_at_equal_time` hold steps,
        seconds of training, PSNR (dB), usage (0..1) and perplexity over all validation pictures,
        and the usage of the last 65,536 training tokens; the gains are ours minus theirs.
    """
    device = start_process_group()
    if run.training.precision == "bf16":
        afford_bf16(device)
    ours = OurTrainer(with_steps(run, steps), device)
    theirs = _Llamagen(ours, device)
    curves: dict[str, list[dict[str, Any]]] = {"ours": [], "llamagen": []}
    at_equal: dict[str, dict[str, Any]] = {}
    with progress("bench vqvae, ours", steps, unit="steps", is_shown=True) as advance:
        while ours.steps < steps or len(at_equal) < 2:
            is_ours = ours.steps < steps and ours.seconds <= theirs.seconds
            contender = ours if is_ours else theirs
            contender.step()
            if is_ours:
                advance(1)
            if contender.steps % max(1, steps // measurements) == 0 and contender.steps <= steps:
                curves["ours" if is_ours else "llamagen"].append(contender.measure())
            if "steps" not in at_equal and theirs.steps >= steps:
                at_equal["steps"] = theirs.measure()
            if "time" not in at_equal and ours.steps >= steps and theirs.seconds >= ours.seconds:
                at_equal["time"] = theirs.measure()
    result = ours.measure()
    return {
        "run": run.name,
        "dataset": run.data.dataset,
        "resolution": run.data.resolution,
        "downsample_factor": run.vqvae.downsample_factor,
        "codebook_size": run.vqvae.codebook_size,
        "batch_images": run.batch.global_batch_images,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "validation_images": len(ours.task.val_images),
        "ours": result,
        "llamagen_at_equal_steps": at_equal["steps"],
        "llamagen_at_equal_time": at_equal["time"],
        "gain_at_equal_steps_db": result["psnr_db"] - at_equal["steps"]["psnr_db"],
        "gain_at_equal_time_db": result["psnr_db"] - at_equal["time"]["psnr_db"],
        "curves": curves,
    }


def with_steps(run: Phase2, steps: int) -> Phase2:
    """The run with another length, without a time budget, and whole batches: one process trains."""
    warmup = min(run.schedule.warmup_steps, steps - 1)
    images = run.batch.global_batch_images
    return run.model_copy(
        update={
            "batch": run.batch.model_copy(update={"micro_batch_images": images}),
            "training": run.training.model_copy(update={"max_steps": steps, "max_minutes": None}),
            "schedule": run.schedule.model_copy(update={"warmup_steps": warmup}),
        }
    )


class OurTrainer:
    """The parts of `lgpt train`, a step at a time and timed.

    Args:
        clock: Seconds of work so far.
        budget_seconds: The learning rate decays towards it, as with `training.max_minutes`.
    """

    name = "ours"

    def __init__(
        self,
        run: Phase2,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
        budget_seconds: Optional[float] = None,
    ) -> None:
        seed_everything(run.seed)
        self.run, self.steps, self.seconds = run, 0, 0.0
        self._clock, self._budget_seconds = clock, budget_seconds
        self.task = VqvaeTask(run, device)
        self.task.build_engines(resolve_deepspeed_config(run, 1))
        self.window = CodeWindow(run.vqvae.codebook_size)
        self.task.model.quantize.register_forward_hook(self._see_tokens)

    def _see_tokens(self, quantizer: nn.Module, inputs: Any, output: Quantized) -> None:
        if quantizer.training:
            self.window.add(output.tokens)

    def step(self) -> None:
        """One optimizer step at the schedule's learning rate."""
        schedule = self.run.schedule
        started_at = self._clock()
        rate = learning_rate_at(
            self.steps,
            peak=self.run.optimizer.learning_rate,
            warmup_steps=schedule.warmup_steps,
            max_steps=self.run.training.max_steps,
            decay=schedule.decay,
            final_ratio=schedule.final_ratio,
            spent_share=self.seconds / self._budget_seconds if self._budget_seconds else 0.0,
        )
        set_learning_rate(self.task.engine, rate)
        self.task.train_step(self.steps)
        self.seconds += self._clock() - started_at
        self.steps += 1

    def measure(self) -> dict[str, Any]:
        """Steps, seconds, and how good pictures come back."""
        self.task.engine.eval()

        def reconstruct(images: Tensor) -> tuple[Tensor, Tensor]:
            output = self.task.engine(images)
            return output.reconstruction, output.tokens

        figures = held_out(reconstruct, self.task.val_images, self.run.vqvae.codebook_size)
        return {**_progress(self), **figures, "window_usage": self.window.usage()}


class _Llamagen:
    """LlamaGen's loop on the pictures of ours, in the same order."""

    name = "llamagen"

    def __init__(self, ours: OurTrainer, device: torch.device) -> None:
        run = ours.run
        seed_everything(run.seed)
        self._ours, self._device = ours, device
        self.steps, self.seconds = 0, 0.0
        self.loop = LlamagenLoop(VQVAEConfig.from_settings(run.vqvae), device)
        self.window = CodeWindow(run.vqvae.codebook_size)

    def step(self) -> None:
        task, size = self._ours.task, self._ours.run.batch.global_batch_images
        started_at = time.perf_counter()
        places = np.arange(self.steps * size, (self.steps + 1) * size)
        items, crops = task.items_and_crops(places)
        pixels = torch.from_numpy(task.train_images.items(items, crops)).to(self._device)
        output = self.loop.step(to_unit_range(pixels))
        self.seconds += time.perf_counter() - started_at
        self.window.add(output.tokens)
        self.steps += 1

    def measure(self) -> dict[str, Any]:
        self.loop.model.eval()

        def reconstruct(images: Tensor) -> tuple[Tensor, Tensor]:
            output = self.loop.model(images)
            return output.pictures, output.tokens

        codes = self._ours.run.vqvae.codebook_size
        figures = held_out(reconstruct, self._ours.task.val_images, codes)
        return {**_progress(self), **figures, "window_usage": self.window.usage()}


def _progress(contender: Any) -> dict[str, Any]:
    return {"steps": contender.steps, "seconds": contender.seconds}


class CodeWindow:
    """Which codes the last 65,536 training tokens were."""

    def __init__(self, codes: int) -> None:
        self._codes, self._tokens, self._held = codes, deque[Tensor](), 0

    def add(self, tokens: Int[Tensor, "b h w"]) -> None:
        """The tokens of one batch."""
        self._tokens.append(tokens.detach().flatten().cpu())
        self._held += tokens.numel()
        while self._held - self._tokens[0].numel() >= _WINDOW_TOKENS:
            self._held -= self._tokens.popleft().numel()

    def usage(self) -> float:
        """Share of the codebook among them, 0..1; 0 before the first batch."""
        if not self._tokens:
            return 0.0
        return code_usage(torch.bincount(torch.cat(list(self._tokens)), minlength=self._codes))


@torch.no_grad()
def held_out(reconstruct: Reconstruct, pictures: ImageBatches, codes: int) -> dict[str, float]:
    """PSNR (dB), usage and perplexity of the codes over all pictures of a set.

    Args:
        reconstruct: Pictures in [-1, 1] to pictures as they come back, and their tokens.
        codes: Codebook size.
    """
    decibels, counts = [], torch.zeros(codes, dtype=torch.int64)
    for start in range(0, len(pictures), _IMAGES_PER_CALL):
        items = np.arange(start, min(start + _IMAGES_PER_CALL, len(pictures)))
        images = to_unit_range(torch.from_numpy(pictures.items(items, np.zeros_like(items))))
        back, tokens = reconstruct(images)
        decibels.append(psnr_decibels(back.float().cpu(), images))
        counts += torch.bincount(tokens.flatten().cpu(), minlength=codes)
    return {
        "psnr_db": float(torch.cat(decibels).mean()),
        "codebook_usage": code_usage(counts),
        "perplexity": code_perplexity(counts),
    }


def recipe_table(result: dict[str, Any]) -> Table:
    """The result of `bench_recipe` for people."""
    title = (
        f"{result['run']} against LlamaGen's recipe: {result['dataset']} at "
        f"{result['resolution']}, f={result['downsample_factor']}, {result['codebook_size']} codes"
    )
    table = Table(title=title)
    for name in ("", "steps", "seconds", "PSNR dB", "gain dB", "usage", "window", "perplexity"):
        table.add_column(name, justify="right" if name else "left")
    rows = (
        ("ours", "ours", None),
        ("LlamaGen, equal steps", "llamagen_at_equal_steps", "gain_at_equal_steps_db"),
        ("LlamaGen, equal time", "llamagen_at_equal_time", "gain_at_equal_time_db"),
    )
    for name, key, gain in rows:
        row = result[key]
        table.add_row(
            name,
            f"{row['steps']:,}",
            f"{row['seconds']:.0f}",
            f"{row['psnr_db']:.2f}",
            "" if gain is None else f"{result[gain]:+.2f}",
            f"{row['codebook_usage']:.1%}",
            f"{row['window_usage']:.1%}",
            f"{row['perplexity']:.0f}",
        )
    return table
