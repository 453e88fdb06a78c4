"""One measurement of `lgpt bench train`, in a process of its own: times, memory, product rate.

Started as `python -m lgpt.training.bench_train_process`; reads its task as JSON from the first
argument and prints its result as JSON on the last line.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor

from lgpt.core.distributed import seed_everything
from lgpt.engine.blocks import apply_block_settings
from lgpt.engine.build import build_engine, parameter_dtype
from lgpt.engine.clock import collectives_timed, seconds_when_done
from lgpt.engine.memory import peak_bytes
from lgpt.engine.start import afford_bf16, device_of_this_rank, multiplies_bf16, start_process_group
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.settings.blocks import BlockSettings
from lgpt.settings.training import OptimizerSettings
from lgpt.training.bench_latents import CachedBatches
from lgpt.training.bench_peers import PeerStep

PARTS = ("data", "forward", "backward", "optimizer")
_PRODUCT_REPEATS = 3
_FIRST_STEPS = 2  # moments are made in the first, and from its end on freed memory is kept


class OurStep:
    """LatentGPT in its DeepSpeed engine, as `lgpt train` runs it."""

    def __init__(self, task: dict[str, Any], config: LatentGPTConfig) -> None:
        device = start_process_group()
        if task["precision"] == "bf16":
            afford_bf16(device)
        with torch.device("meta"):
            model = LatentGPT(config)
        apply_block_settings(model, BlockSettings(**task["blocks"]))
        self.engine = build_engine(model, OptimizerSettings(**task["optimizer"]), task["deepspeed"])
        self.engine.train()
        self.device = device

    def text(self, batch: int, words: int, width: Any) -> tuple[Any, ...]:
        nobody = torch.zeros(batch, dtype=torch.bool, device=self.device)
        if width is None:
            return None, None, nobody
        dtype = parameter_dtype(self.engine)
        text = torch.randn(batch, words, width, device=self.device).to(dtype)
        return text, torch.ones(batch, words, dtype=torch.bool, device=self.device), nobody

    def forward(self, tokens: Tensor, text: Any) -> Tensor:
        loss: Tensor = self.engine(tokens, *text[:2], targets=tokens, null_text=text[2])
        return loss

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each part of each step, and the most memory of this process."""
    config = LatentGPTConfig.from_dict(task["model"])
    device = device_of_this_rank()
    seed_everything(0)
    if task["what"] == "products":
        is_bf16 = task["precision"] == "bf16" and multiplies_bf16(device)
        dtype = torch.bfloat16 if is_bf16 else torch.float32  # what our step multiplies in, too
        seconds = _seconds_of_products(config, task["micro_batch"], device, dtype)
        return {"seconds": seconds, "dtype": str(dtype).split(".")[1]}
    step: Any
    words: list[int] = []
    if task["what"] == "lgpt":
        step = OurStep(task, config)
        batches = CachedBatches(task, device, parameter_dtype(step.engine))
        read, words = batches.next, batches.words
    else:
        step = PeerStep(task["what"], config, task["parameters"], device, task["precision"])
        read = partial(_random_batch, step, task, config)
    count = _FIRST_STEPS + task["steps"]
    steps = [_one_step(step, read, device) for _ in range(count)]
    result = {
        "parts": steps[_FIRST_STEPS:],
        "peak_bytes": peak_bytes(device),
        "threads": torch.get_num_threads(),
        "words": words[_FIRST_STEPS:],
    }
    if task["what"] == "lgpt" and task["ranks"] > 1:
        with collectives_timed() as seconds:
            _one_step(step, read, device)
        result["communication_seconds"] = seconds()
    return result


def _random_batch(
    step: PeerStep, task: dict[str, Any], config: LatentGPTConfig
) -> tuple[Tensor, Any]:
    shape = (task["micro_batch"], config.num_tokens)
    tokens = torch.randint(config.codebook_size, shape, device=step.device)
    return tokens, step.text(shape[0], task["words"], config.text_width)


def _one_step(
    step: Any, read: Callable[[], tuple[Tensor, Any]], device: torch.device
) -> dict[str, float]:
    times = [seconds_when_done(device)]
    tokens, text = read()
    times.append(seconds_when_done(device))
    loss = step.forward(tokens, text)
    times.append(seconds_when_done(device))
    step.backward(loss)
    times.append(seconds_when_done(device))
    step.step()
    times.append(seconds_when_done(device))
    return {part: after - before for part, before, after in zip(PARTS, times, times[1:])}


def product_shapes(config: LatentGPTConfig) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how often) of the products over image tokens in one forward pass."""
    width, inner = config.hidden, config.mlp_hidden or 4 * config.hidden
    up = 2 * inner if config.mlp == "swiglu" else inner
    layers = config.layers
    return [
        (width, 3 * width, layers),
        (width, width, 3 * layers),  # out, and cross-attention's query and out
        (width, up, layers),
        (inner, width, layers),
        (width, config.codebook_size, 1),
    ]


def _seconds_of_products(
    config: LatentGPTConfig, micro_batch: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds that a step's matrix products alone take: forward, and two each in backward."""
    rows = micro_batch * config.num_tokens
    total = 0.0
    for inputs, outputs, count in product_shapes(config):
        x = torch.randn(rows, inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        slope = torch.randn(rows, outputs, device=device).to(dtype)
        for product in (
            lambda x=x, w=weight: x @ w.t(),
            lambda g=slope, w=weight: g @ w,
            lambda g=slope, x=x: g.t() @ x,
        ):
            total += count * best_seconds(product, device)
    return total


def best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The least that some work took in three trials, after one that is not counted."""
    work()
    best = float("inf")
    for _ in range(_PRODUCT_REPEATS):
        started_at = seconds_when_done(device)
        work()
        best = min(best, seconds_when_done(device) - started_at)
    return best


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)
