"""`lgpt bench train`: what a run's training step costs here, and beside two other systems.

Every measurement is a process of its own (`bench_train_process.py`), so that its peak memory is
its own and a failure for want of memory ends nothing else. The rounds take turns: in each, every
contestant runs once, so that a machine that gets slower does it to all. A peer that does not fit
into memory is left out of the others' comparison and named.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Optional

from rich.table import Table

from lgpt.core.errors import OutOfMemoryError, SettingsError
from lgpt.core.logging import get_logger
from lgpt.data.progress import progress
from lgpt.engine.available_memory import available_bytes
from lgpt.engine.planned_model import planned_config
from lgpt.engine.start import device_of_this_rank, multiplies_bf16
from lgpt.models.latent_gpt import LatentGPTConfig
from lgpt.planning.parameters import run_parameters
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.phases import TransformerRun
from lgpt.settings.training import BatchSettings
from lgpt.training.bench_latents import training_cache
from lgpt.training.bench_micro_batch import largest_micro_batch
from lgpt.training.bench_peers import PEERS
from lgpt.training.bench_ranks import run_ranks
from lgpt.training.bench_train_process import PARTS, product_shapes

_log = get_logger(__name__)
_GIB = 2**30


def bench_train(
    run: TransformerRun,
    *,
    steps: int,
    rounds: int,
    words: int,
    with_peers: bool,
    find_micro_batch: bool,
    memory_gib: Optional[float],
    ranks: int = 1,
) -> dict[str, Any]:
    """Measure training steps of a run's transformer.

    Ours reads the run's latent cache, where it is there and fits, or else a temporary one of random
    tokens and text, as `lgpt train` does. The peers get random tensors.

    Args:
        run: Transformer, blocks, precision, DeepSpeed config and `batch.micro_batch_images`.
        steps: Measured steps a round, after two that are not counted.
        rounds: Medians over all steps of all rounds are given; ratios are medians over rounds.
        words: Text tokens a picture, where the run's cache does not tell.
        with_peers: Also LlamaGen's text-to-image step and transformers' GPT2 with cross-attention.
        find_micro_batch: Find the largest micro batch that fits, and measure it.
        memory_gib: For `find_micro_batch`; default on a CPU: 0.9 of what is available.
        ranks: Processes of ours on this machine, each with a micro batch: 8 on a node of 8 GPUs.
            The peers always run as one.

    Returns:
        JSON values. `data_share` is the part of our step that waits for its batch: reading, moving
        to the device, casting. `words_read` are text tokens of our batches (the longest caption's,
        median). `model_flops_utilisation` is the FLOPs of the model's products and attention a
        second and rank (causal attention counted by half) over the rate of the same products alone,
        on as many ranks at once. `communication_seconds` of ours is what all collectives of a step
        take one after the other, measured in a step of its own: what overlaps with computing costs
        less. It is 0 with one rank. `did_not_fit` are peers for which memory was too small.

    Raises:
        OutOfMemoryError: Not even the smallest batch of ours ran.
        SettingsError: The model's shape cannot be known, a measurement failed, or the peers would
            multiply in bf16 on a CPU that has no such products.
    """
    config = planned_config(run)
    if with_peers and run.training.precision == "bf16":
        _refuse_slow_bf16()
    micro_batch, tried = run.batch.micro_batch_images, []
    names = ("lgpt", *(PEERS if with_peers else ()))
    with training_cache(run, config, words) as source:
        base = _base_task(run, config, words, ranks, source.folder)
        if find_micro_batch:
            micro_batch, tried = _largest_micro_batch(run, base, memory_gib)
        task = {**_task(run, base, micro_batch, steps), "parameters": run_parameters(run)}
        seen, products = _measured_in_turns(task, names, rounds)
    reading = _reading(seen["lgpt"])
    contestants = {
        name: _summary(runs, micro_batch * (ranks if name == "lgpt" else 1), config)
        for name, runs in seen.items()
    }
    flops = model_flops(config, micro_batch, reading["words_read"])
    rate = flops / contestants["lgpt"]["step_seconds"]
    return {
        "name": run.name,
        "parameters": task["parameters"],
        **_shape(config),
        "words": words,
        "data_source": source.remark,
        **reading,
        "micro_batch": micro_batch,
        "micro_batches_tried": tried,
        "precision": run.training.precision,
        "blocks": run.blocks.model_dump(),
        "threads": seen["lgpt"][0]["threads"],
        "ranks": ranks,
        "rounds": rounds,
        "steps": steps,
        "model_flops": flops,
        **_utilisation(rate, _product_flops(config, micro_batch), products),
        "contestants": contestants,
        "ratios": {name: _ratios(seen, contestants, name, ranks) for name in seen if name in PEERS},
        "did_not_fit": [name for name in names if name not in seen],
    }


def _refuse_slow_bf16() -> None:
    """Ours computes products in float32 there (engine/start.py); the peers would not."""
    if multiplies_bf16(device_of_this_rank()):
        return
    raise SettingsError(
        "--peers in bf16 on this CPU would compare with products that are emulated, hundreds of "
        "times slower; give training.precision=fp32, which all three then train in, or use a "
        "device that multiplies bf16."
    )


def _ratios(
    seen: dict[str, list[dict[str, Any]]],
    contestants: dict[str, dict[str, Any]],
    name: str,
    ranks: int,
) -> dict[str, float]:
    """Ours over a peer's: images a second, round by round, and the most memory."""
    rates = [
        ranks * _step_seconds(theirs) / _step_seconds(mine)
        for mine, theirs in zip(seen["lgpt"], seen[name])
    ]
    return {
        "images_per_second": statistics.median(rates),
        "peak_bytes": contestants["lgpt"]["peak_bytes"] / contestants[name]["peak_bytes"],
    }


def _measured_in_turns(
    task: dict[str, Any], names: tuple[str, ...], rounds: int
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Every contestant once a round, and the products alone; without the peers that do not fit."""
    seen: dict[str, list[dict[str, Any]]] = {what: [] for what in (*names, "products")}
    total = rounds * len(seen)
    with progress("bench train", total, unit="measurements", is_shown=True) as advance:
        for number in range(rounds):
            for what in (*(names if number % 2 == 0 else reversed(names)), "products"):
                try:
                    if what in seen:
                        seen[what].append(_measured({**task, "what": what}))
                    if what == "lgpt":  # the peers' texts are as long as ours, which are read
                        task = {**task, "words": round(statistics.median(seen[what][-1]["words"]))}
                except OutOfMemoryError as error:
                    if what not in PEERS:
                        raise
                    _log.warning("%s The others are measured without it.", error)
                    del seen[what]
                advance(1)
    products = seen.pop("products")
    return seen, products


def _base_task(
    run: TransformerRun, config: LatentGPTConfig, words: int, ranks: int, cache: Path
) -> dict[str, Any]:
    """What all measurements have in common."""
    return {
        "what": "lgpt",
        "model": dataclasses.asdict(config),
        "blocks": run.blocks.model_dump(),
        "optimizer": run.optimizer.model_dump(),
        "ranks": ranks,
        "precision": run.training.precision,
        "words": words,
        "cache": str(cache),
        "seed": run.seed,
        "cond_drop": run.transformer.cond_drop,
    }


def _task(
    run: TransformerRun, base: dict[str, Any], micro_batch: int, steps: int
) -> dict[str, Any]:
    ranks = base["ranks"]
    one_step = BatchSettings(
        global_batch_images=micro_batch * ranks, micro_batch_images=micro_batch
    )
    deepspeed = resolve_deepspeed_config(run.model_copy(update={"batch": one_step}), ranks)
    return {**base, "deepspeed": deepspeed, "micro_batch": micro_batch, "steps": steps}


def _measured(task: dict[str, Any]) -> dict[str, Any]:
    """One contestant in processes of its own; of ours, times of rank 0 and the largest peak.

    The products run on as many ranks at once as ours: they share cores and memory's bandwidth too.
    """
    ranks = 1 if task["what"] in PEERS else task["ranks"]
    codes, outs, errors = run_ranks(
        [sys.executable, "-m", "lgpt.training.bench_train_process", json.dumps(task)], ranks
    )
    if not any(codes):
        results = [json.loads(out.splitlines()[-1]) for out in outs]
        if task["what"] == "products":
            return {**results[0], "seconds": statistics.mean(each["seconds"] for each in results)}
        peak = max(each.get("peak_bytes", 0) for each in results)
        return {**results[0], "peak_bytes": peak} if peak else dict(results[0])
    words = f"{task['what']} with {task['micro_batch']} pictures"
    code, told = next((code, error) for code, error in zip(codes, errors) if code)
    # The kernel ends a process that takes too much with signal 9.
    if code == -9 or "OutOfMemoryError" in told or "memory" in told[-500:]:
        raise OutOfMemoryError(f"{words} did not fit; give a smaller batch.micro_batch_images=.")
    last = (told.strip().splitlines() or ["it said nothing"])[-1]
    raise SettingsError(f"{words} cannot be measured: {last}")


def _largest_micro_batch(
    run: TransformerRun, base: dict[str, Any], memory_gib: Optional[float]
) -> tuple[int, list[dict[str, Any]]]:
    limit = memory_gib * _GIB if memory_gib is not None else _free_bytes()
    if limit is not None and device_of_this_rank().type != "cuda":  # GPUs have a memory each
        limit /= base["ranks"]

    def peak_of(size: int) -> int:
        return int(_measured(_task(run, base, size, 1))["peak_bytes"])

    return largest_micro_batch(peak_of, limit)


def _free_bytes() -> Optional[float]:
    """Nine tenths of what a CPU has free; None on a GPU, whose allocator says when it is full."""
    if device_of_this_rank().type == "cuda":
        return None
    available = available_bytes()
    if available is None:
        raise SettingsError("this system does not say how much memory is free; give --memory-gib.")
    return 0.9 * available


def _product_flops(config: LatentGPTConfig, micro_batch: int) -> float:
    rows = micro_batch * config.num_tokens
    return sum(6.0 * rows * i * o * count for i, o, count in product_shapes(config))


def model_flops(config: LatentGPTConfig, micro_batch: int, words: int) -> float:
    """Floating-point operations of one step that the model needs; recomputation is not counted.

    6 a weight and row for the products; 12 L D a token for full attention's scores and sums, of
    which causal attention needs half.
    """
    tokens, width, layers = config.num_tokens, config.hidden, config.layers
    seen_words = 1 + (words if config.text_width else 0)
    text_products = 6.0 * micro_batch * seen_words * (config.text_width or width) * 2 * width
    attention = micro_batch * tokens * width * (6.0 * tokens + 12.0 * seen_words)
    return _product_flops(config, micro_batch) + layers * (text_products + attention)


def _step_seconds(measured: dict[str, Any]) -> float:
    return statistics.median(sum(parts.values()) for parts in measured["parts"])


def _utilisation(
    model_rate: float, product_flops: float, products: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the model reaches a second, of what the products alone reach."""
    rate = product_flops / statistics.median(each["seconds"] for each in products)
    return {
        "product_flops_per_second": rate,
        "product_dtype": products[0]["dtype"],
        "model_flops_utilisation": model_rate / rate,
    }


def _shape(config: LatentGPTConfig) -> dict[str, int]:
    return {
        "layers": config.layers,
        "hidden": config.hidden,
        "codes": config.codebook_size,
        "tokens_per_image": config.num_tokens,
    }


def _reading(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How long our batches' texts are, and the part of our steps that waits for batches."""
    steps = [parts for measured in runs for parts in measured["parts"]]
    return {
        "words_read": round(statistics.median(w for each in runs for w in each["words"])),
        "data_share": statistics.median(parts["data"] / sum(parts.values()) for parts in steps),
    }


def _summary(runs: list[dict[str, Any]], images: int, config: LatentGPTConfig) -> dict[str, Any]:
    steps = [parts for measured in runs for parts in measured["parts"]]
    seconds = statistics.median(sum(parts.values()) for parts in steps)
    return {
        "step_seconds": seconds,
        "images_per_second": images / seconds,
        "tokens_per_second": images * config.num_tokens / seconds,
        "peak_bytes": max(measured["peak_bytes"] for measured in runs),
        **{f"{part}_seconds": statistics.median(p[part] for p in steps) for part in PARTS},
        "communication_seconds": statistics.median(
            measured.get("communication_seconds", 0.0) for measured in runs
        ),
    }


def train_table(result: dict[str, Any]) -> Table:
    """The result of `bench_train` for people."""
    table = Table(
        title=f"Training step of {result['name']}: {result['parameters']:,} parameters, "
        f"{result['micro_batch']} pictures of {result['tokens_per_image']} tokens"
        + (f" on each of {result['ranks']} ranks" if result["ranks"] > 1 else "")
    )
    parts = (*PARTS, "communication") if result["ranks"] > 1 else PARTS
    columns = ("", "images/s", "tokens/s", "step s", *parts, "peak GiB", "images/s of ours")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, c in result["contestants"].items():
        ratio = result["ratios"].get(name, {}).get("images_per_second")
        table.add_row(
            name,
            f"{c['images_per_second']:.3f}",
            f"{c['tokens_per_second']:.0f}",
            f"{c['step_seconds']:.3f}",
            *(f"{c[part + '_seconds']:.3f}" for part in parts),
            f"{c['peak_bytes'] / _GIB:.2f}",
            "" if ratio is None else f"{ratio:.2f}x",
        )
    for name in result["did_not_fit"]:
        table.add_row(name, "did not fit")
    table.caption = (
        f"model-FLOPs utilisation {result['model_flops_utilisation']:.1%} of "
        f"{result['product_flops_per_second'] / 1e9:,.0f} GFLOP/s of its "
        f"{result['product_dtype']} matrix products alone; data {result['data_share']:.2%} of our "
        f"step, from {result['data_source']}; "
        + (
            "one process, so nothing is sent"
            if result["ranks"] == 1
            else "communication: all collectives of a step one after the other"
        )
    )
    return table
