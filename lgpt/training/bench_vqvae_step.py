"""`lgpt bench vqvae-step`: phase 2's whole step against the sum of its parts, timed bare.

Ours is what `lgpt train` runs: the task with its pictures, metrics and health monitor, both
DeepSpeed engines. Beside it, on one batch that is there already:
- engines: forward, backward and step of the same two engines. More than that is our host work.
- bare: the same two networks in plain PyTorch. More than that is host work of ours or of ZeRO
  (gradients copied into buckets, their norms one by one in float64), which grows with the number
  of weights, not with the pictures.
All three are measured in one process, in turn; peak memory before that, while ours alone is there.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from lgpt.core.distributed import seed_everything
from lgpt.data.progress import progress
from lgpt.engine.build import parameter_groups, set_learning_rate
from lgpt.engine.memory import forget_peak, peak_bytes
from lgpt.engine.start import afford_bf16, start_process_group
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.phases import Phase2
from lgpt.training.bench_products import Products
from lgpt.training.bench_recipe import with_steps
from lgpt.training.gan_losses import hinge_discriminator_loss, hinge_generator_loss
from lgpt.training.losses import reconstruction_loss
from lgpt.training.train_vqvae import VqvaeTask

_WARMUP_STEPS = 2
_ALONE_STEPS = 2  # moments are made in the first
_ORDERS = tuple(itertools.permutations(range(3)))
Parts = dict[str, float]


def bench_vqvae_step(run: Phase2, *, rounds: int) -> dict[str, Any]:
    """Measure one step of both players a round: ours, the engines', and bare, in changing order.

    Pictures of a set that fits in memory are there, as in every epoch but the first.

    Args:
        run: Its whole global batch is one micro batch; the discriminator, where there is one,
            counts from the first step.

    Returns:
        JSON values: CPU seconds (of all threads) and wall seconds, medians over the rounds, of our
        step, of the engines alone and of every bare part. `ratio_cpu` and `ratio_wall` are ours
        over the sum of the bare parts, `ratio_engines_*` ours over the engines alone, medians over
        the rounds. `images_per_second` and `tokens_per_second` (of the latent grid) are our step's,
        and so is `peak_bytes`, the process's with weights, optimizer and pictures (on CUDA what is
        allocated); None where the system does not tell. `flops_utilisation` is what our step does
        a second, of what its convolutions and matrix products do alone; all that a step computes
        counts, with `blocks.checkpointing` also what it computes twice.
    """
    device = start_process_group()
    if run.training.precision == "bf16":
        afford_bf16(device)
    steps = _ALONE_STEPS + _WARMUP_STEPS + rounds
    run = with_steps(run, steps + 1)
    player = run.discriminator.model_copy(update={"start_step": 0, "warmup_steps": 0})
    run = run.model_copy(update={"discriminator": player})
    seed_everything(run.seed)
    task = VqvaeTask(run, device)
    task.build_engines(resolve_deepspeed_config(run, 1))
    _read_pictures(task, steps + 1)
    peak = _peak_of_our_steps(task)
    bare = _Bare(task, *_networks_of(VqvaeTask(run, device)))
    measured: list[tuple[Parts, Parts, Parts]] = []
    with progress("bench vqvae-step", rounds, unit="rounds", is_shown=True) as advance:
        for step in range(_ALONE_STEPS, steps):
            contenders = (
                lambda step=step: _our_step(task, step),
                lambda step=step: _engine_step(task, bare.images, step),
                bare.step,
            )
            done = {which: contenders[which]() for which in _ORDERS[step % len(_ORDERS)]}
            if step >= _ALONE_STEPS + _WARMUP_STEPS:
                measured.append((done[0], done[1], done[2]))
                advance(1)
    images, figures = run.batch.global_batch_images, _figures(measured)
    with Products() as products:
        bare.step()
    return {
        "run": run.name,
        "resolution": run.data.resolution,
        "images": images,
        "adversarial": run.loss.adversarial,
        "precision": run.training.precision,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "images_per_second": images / figures["step_wall_seconds"],
        "tokens_per_second": images * task.tokens_per_image / figures["step_wall_seconds"],
        "peak_bytes": peak,
        **_utilisation(products, figures["step_wall_seconds"], device),
        **figures,
    }


def _utilisation(products: Products, step_seconds: float, device: torch.device) -> dict[str, float]:
    alone = products.seconds_alone(device)
    return {
        "step_flops": products.flops,
        "product_flops_per_second": products.flops / alone,
        "flops_utilisation": alone / step_seconds,
    }


def _networks_of(task: VqvaeTask) -> list[nn.Module]:
    return [task.model, *([task.adversary.model] if task.adversary else [])]


def _peak_of_our_steps(task: VqvaeTask) -> Optional[int]:
    if not forget_peak(task.device):
        return None
    for step in range(_ALONE_STEPS):
        _our_step(task, step)
    return peak_bytes(task.device)


def _figures(measured: list[tuple[Parts, Parts, Parts]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for clock in ("cpu", "wall"):
        ends = f"_{clock}_seconds"
        ours = [mine[f"step{ends}"] for mine, _, _ in measured]
        engines = [alone[f"engines{ends}"] for _, alone, _ in measured]
        sums = [sum(v for k, v in parts.items() if k.endswith(ends)) for _, _, parts in measured]
        names = [name for name in measured[0][2] if name.endswith(ends)]
        figures[f"step{ends}"] = statistics.median(ours)
        figures[f"engines{ends}"] = statistics.median(engines)
        figures[f"parts{ends}"] = {
            name[: -len(ends)]: statistics.median(parts[name] for _, _, parts in measured)
            for name in names
        }
        figures[f"sum_of_parts{ends}"] = statistics.median(sums)
        figures[f"ratio_{clock}"] = statistics.median(a / b for a, b in zip(ours, sums))
        figures[f"ratio_engines_{clock}"] = statistics.median(a / b for a, b in zip(ours, engines))
    return figures


def _read_pictures(task: VqvaeTask, steps: int) -> None:
    """What every epoch but the first finds in memory; sets too large for it are read again."""
    images = task.run.batch.global_batch_images
    for step in range(steps):
        places = np.arange(images) + step * images
        task.train_images.items(*task.items_and_crops(places))


def _our_step(task: VqvaeTask, step: int) -> Parts:
    taken: Parts = {}

    def work() -> None:
        set_learning_rate(task.engine, task.run.optimizer.learning_rate)
        task.train_step(step)

    _timed(taken, "step", work, task.device)
    return taken


def _engine_step(task: VqvaeTask, images: Tensor, step: int) -> Parts:
    taken: Parts = {}

    def work() -> None:
        task.engine.train()
        task.model.quantize.begin_step()
        task.micro_step(images, step)
        task.model.quantize.finish_step(seed=task.run.seed, step=step)

    _timed(taken, "engines", work, task.device)
    return taken


def _timed(taken: Parts, name: str, work: Callable[[], Any], device: torch.device) -> Any:
    started = time.process_time(), time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken[f"{name}_cpu_seconds"] = time.process_time() - started[0]
    taken[f"{name}_wall_seconds"] = time.perf_counter() - started[1]
    return result


class _Bare:
    """The same networks, batch and optimizers, without an engine.

    Attributes:
        images: Noise in [-1, 1], of the weights' type.
    """

    def __init__(self, task: VqvaeTask, model: nn.Module, *player: nn.Module) -> None:
        run, device = task.run, task.device
        self._task, self._run, self._device = task, run, device
        self._dtype = next(task.engine.module.parameters()).dtype
        self._players = [each.to(device, self._dtype) for each in (model, *player)]
        images = run.batch.global_batch_images
        side = run.data.resolution
        self.images = (torch.rand(images, 3, side, side) * 2 - 1).to(device, self._dtype)
        self._masters = [_Masters(each, run) for each in self._players]
        self._steps = 0

    def step(self) -> Parts:
        """One step of both players; the time of every part."""
        taken: Parts = {}
        model, run = self._players[0].train(), self._run

        def forward() -> Any:
            model.quantize.begin_step()
            output = model(self.images)
            return output, self._losses(output)

        output, (picture_loss, latent_loss, seen) = self._part(taken, "vqvae_forward", forward)
        adversarial = None
        if len(self._players) > 1:
            adversarial = self._part(taken, "adversarial_gradient", lambda: self._adversarial(seen))

        def backward() -> None:
            if adversarial is None:
                (picture_loss + latent_loss).backward()
                return
            (gradient,) = torch.autograd.grad(picture_loss, seen)
            gradient = gradient + run.discriminator.weight * adversarial
            ((output.reconstruction.float() * gradient).sum() + latent_loss).backward()

        def update() -> None:
            self._masters[0].step()
            model.quantize.finish_step(seed=run.seed, step=self._steps)

        self._part(taken, "vqvae_backward", backward)
        self._part(taken, "vqvae_optimizer", update)
        if len(self._players) > 1:
            self._part(taken, "discriminator", lambda: self._teach(seen.detach()))
            self._part(taken, "discriminator_optimizer", self._masters[1].step)
        self._steps += 1
        return taken

    def _part(self, taken: Parts, name: str, work: Callable[[], Any]) -> Any:
        return _timed(taken, name, work, self._device)

    def _losses(self, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss = self._run.loss
        seen = output.reconstruction
        if len(self._players) > 1:
            seen = seen.detach().float().requires_grad_()
        picture_loss = reconstruction_loss(seen, self.images, loss.reconstruction)
        if self._task.perceptual is not None:
            perceptual = self._task.perceptual(seen, self.images).mean()
            picture_loss = picture_loss + loss.perceptual_weight * perceptual
        latent_loss = loss.codebook_weight * output.codebook_loss
        latent_loss = latent_loss + loss.commitment_weight * output.commitment_loss
        if loss.entropy_weight:
            latent_loss = latent_loss + loss.entropy_weight * output.entropy_loss
        return picture_loss, latent_loss, seen

    def _adversarial(self, seen: Tensor) -> Tensor:
        player = self._players[1].requires_grad_(False)
        loss = hinge_generator_loss(player(seen.to(self._dtype)).float())
        (gradient,) = torch.autograd.grad(loss, seen)
        player.requires_grad_(True)
        return gradient

    def _teach(self, seen: Tensor) -> None:
        both = torch.cat([self.images, seen.to(self._dtype)])
        real, fake = self._players[1](both).float().chunk(2)
        hinge_discriminator_loss(real, fake).backward()


class _Masters:
    """Clipping and a fused AdamW, on float32 copies of the weights where they are bf16."""

    def __init__(self, network: nn.Module, run: Phase2) -> None:
        settings = run.optimizer
        self._clip = settings.gradient_clipping
        groups = parameter_groups(network, settings.weight_decay)
        self._weights = [weight for group in groups for weight in group["params"]]
        for group in groups:
            group["params"] = [nn.Parameter(each.detach().float()) for each in group["params"]]
        self._masters = [master for group in groups for master in group["params"]]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )

    @torch.no_grad()
    def step(self) -> None:
        """From the weights' gradients to new weights."""
        for weight, master in zip(self._weights, self._masters):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._masters, self._clip)
        self._optimizer.step()
        if self._weights[0].dtype != torch.float32:
            torch._foreach_copy_(self._weights, self._masters)


def step_table(result: dict[str, Any]) -> Table:
    """The result of `bench_vqvae_step` for people."""
    table = Table(
        title=f"Step of {result['run']}: {result['images']} pictures of {result['resolution']} "
        f"pixels a side, {result['precision']}, adversarial {result['adversarial']}"
    )
    for column in ("", "CPU ms", "wall ms"):
        table.add_column(column, justify="right" if column else "left")
    cpu, wall = result["parts_cpu_seconds"], result["parts_wall_seconds"]
    rows = [(name, cpu[name], wall[name]) for name in cpu]
    for name in ("sum_of_parts", "engines", "step"):
        rows.append((name, result[f"{name}_cpu_seconds"], result[f"{name}_wall_seconds"]))
    for name, cpu_seconds, wall_seconds in rows:
        label = name.replace("_", " ")
        table.add_row(label, f"{1000 * cpu_seconds:.1f}", f"{1000 * wall_seconds:.1f}")
    for name, key in (("sum", "ratio"), ("engines", "ratio_engines")):
        ratios = result[f"{key}_cpu"], result[f"{key}_wall"]
        table.add_row(f"step over {name}", *(f"{ratio:.3f}x" for ratio in ratios))
    peak, rate = result["peak_bytes"], result["product_flops_per_second"] / 1e9
    table.caption = (
        f"our step: {result['images_per_second']:.2f} images/s, "
        f"{result['tokens_per_second']:.0f} tokens/s"
        + ("" if peak is None else f", peak {peak / 2**30:.2f} GiB")
        + f", {result['flops_utilisation']:.0%} of the {rate:,.0f} GFLOP/s of its convolutions and "
        + "products alone"
        + f"; medians of {result['rounds']} rounds, {result['threads']} thread(s)"
    )
    return table
