"""`lgpt bench sample`: how fast a run's transformer draws, beside two others and what could be.

A token cannot come sooner than the weights and caches that it needs come out of memory: that is the
bound. All systems draw with guidance on random weights, each in the faster dtype that it has here:
PyTorch's bf16 needs bf16 units, ours a compiler. An unconditional model draws without text and
guidance, one row a picture, and alone: both others read a text. They take turns in every round, so
that a machine that gets slower does it to all. Time counts from the first drawn token on, so
reading the text and a picture's beginning is in nobody's favour. Memory is measured before: ours
draws each batch once while nothing else is built.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from typing import Any, Optional

import torch
from rich.table import Table
from torch import Tensor

from lgpt.core.errors import SettingsError
from lgpt.data.progress import progress
from lgpt.engine.clock import seconds_when_done
from lgpt.engine.memory import forget_peak, peak_bytes
from lgpt.engine.planned_model import planned_config
from lgpt.engine.start import device_of_this_rank, multiplies_bf16
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.sampling.bench_peers import Gpt2Sampler, LlamaGenSampler
from lgpt.sampling.generate import generate_tokens
from lgpt.sampling.layout import fastest_dtype, lay_out_for_drawing
from lgpt.settings.phases import TransformerRun

OURS, LLAMAGEN, GPT2 = "lgpt", "LlamaGen's sampler", "transformers' GPT2"
INT8 = "lgpt, 8-bit weights"
_READ_BYTES = 256 * 2**20
_LEAST_GUIDANCE = 1.5  # where the run has none: both halves are drawn all the same


def bench_sample(
    run: TransformerRun,
    *,
    batches: Sequence[int] = (1, 16),
    rounds: int = 5,
    tokens: Optional[int] = None,
    words: int = 20,
    peers: bool = True,
    int8: bool = False,
) -> dict[str, Any]:
    """Measure drawing with a run's transformer, random weights, with guidance if it reads text.

    Args:
        run: Its transformer, resolution, VQ-VAE, text encoder and sampling numbers are taken; none
            of its files is opened.
        batches: Pictures at a time, measured one after the other.
        rounds: Each lets every system draw once; medians are given.
        tokens: Draw only a picture's last so many, after random ones that are given.
        words: Text tokens of a prompt; an unconditional model has none.
        peers: Measure LlamaGen's sampler and transformers' GPT2 too, if the run's model reads text.
        int8: Measure ours with 8-bit weights too, on a CPU.

    Returns:
        JSON values. For every batch and system tokens and images a second, for ours (and in `int8`
        for its 8-bit weights) also the bytes that a step reads (weights once, caches half full),
        the tokens a second that the measured read bandwidth allows, and the share of them that was
        reached; `peak_bytes` is the most that this process took (on CUDA: allocated) while ours
        alone drew the batch, its weights included; None where the system does not tell. `ratios`
        are ours by theirs, medians over rounds. `left_out` are peers that were asked for and cannot
        draw what the run's model does.

    Raises:
        SettingsError: The shape cannot be known from the settings, `tokens` do not fit, or there
            can be no 8-bit weights here.
    """
    config = planned_config(run)
    has_text = config.text_width is not None
    words = words if has_text else 0
    tokens = tokens or config.num_tokens
    if not 2 <= tokens <= config.num_tokens:
        raise SettingsError(f"--tokens {tokens} must lie between 2 and {config.num_tokens}.")
    device = device_of_this_rank()
    dtype = fastest_dtype(device)
    peers_dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    ours = _Ours(config, run, device, dtype)
    numbers = {
        "guidance": max(run.sampling.guidance, _LEAST_GUIDANCE) if has_text else 1.0,
        "temperature": run.sampling.temperature,
        "top_k": run.sampling.top_k,
    }
    peaks = [_peak_of_drawing(ours, batch, tokens, words, numbers) for batch in batches]
    systems: dict[str, Any] = {OURS: ours}
    if int8:
        systems[INT8] = _Ours(config, run, device, torch.int8)
    if peers and has_text:
        for name, kind in ((LLAMAGEN, LlamaGenSampler), (GPT2, Gpt2Sampler)):
            systems[name] = kind(config, ours.parameters_count, device, peers_dtype)
    results = [
        {**_measure(systems, batch, rounds, tokens, words, numbers), "peak_bytes": peak}
        for batch, peak in zip(batches, peaks)
    ]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "peers_dtype": str(peers_dtype).removeprefix("torch."),
        "tokens_per_image": config.num_tokens,
        "tokens_drawn": tokens,
        "text_tokens": words,
        "rounds": rounds,
        **numbers,
        "parameters": {name: system.parameters_count for name, system in systems.items()},
        "left_out": [LLAMAGEN, GPT2] if peers and not has_text else [],
        "batches": results,
    }


class _Ours:
    """LatentGPT with random weights, as `TextToImagePipeline` holds it."""

    def __init__(
        self,
        config: LatentGPTConfig,
        run: TransformerRun,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        model = LatentGPT(config).eval()
        torch.nn.init.normal_(model.head.weight, std=0.02)
        self.parameters_count, self.run = model.num_parameters(), run
        # Of the embedding a step reads a few rows; the text's keys and values are made once.
        once = [block.cross_attention.kv.weight for block in model.blocks] + [
            model.token_embedding.weight
        ]
        rest = self.parameters_count - sum(weight.numel() for weight in once)
        self.weight_bytes = rest * dtype.itemsize
        lay_out_for_drawing(model, device, dtype)
        self.model = model

    def bytes_per_step(self, batch: int, words: int, places: float) -> float:
        """What one step must read: weights, and of each row's caches what is filled and seen."""
        config = self.model.config
        kept = self.model.start_decoding(max_batch=1).blocks[0].image.keys
        per_position = 2 * config.hidden * config.layers * kept.element_size()
        seen = places + 1  # without text the null embedding alone
        if config.text_width is not None:
            seen += places + 1 + words
        return self.weight_bytes + batch * per_position * seen

    def draw(self, text: Optional[Tensor], given: Tensor, **numbers: Any) -> list[float]:
        """The moments at which tokens were there; as the peers' `draw`."""
        stamps: list[float] = []

        def progress(count: int) -> None:
            stamps.append(seconds_when_done(given.device))

        sampling = self.run.sampling
        generate_tokens(
            self.model,
            text,
            seeds=range(len(given)),
            given=given if given.shape[1] else None,
            progress=progress,
            guidance_schedule=sampling.guidance_schedule,
            guidance_power=sampling.guidance_power,
            top_p=sampling.top_p,
            **numbers,
        )
        return stamps[1:] if given.shape[1] else stamps  # the given ones are told of first


def _inputs(ours: _Ours, batch: int, tokens: int, words: int) -> tuple[Optional[Tensor], Tensor]:
    """Random text, and all but the last `tokens` tokens of each picture."""
    config, device = ours.model.config, next(ours.model.parameters()).device
    text = None
    if config.text_width is not None:
        text = torch.randn(batch, words, config.text_width, device=device)
    given_shape = (batch, config.num_tokens - tokens)
    return text, torch.randint(config.codebook_size, given_shape, device=device)


def _peak_of_drawing(
    ours: _Ours, batch: int, tokens: int, words: int, numbers: dict[str, Any]
) -> Optional[int]:
    text, given = _inputs(ours, batch, tokens, words)
    gc.collect()
    if not forget_peak(given.device):
        return None
    ours.draw(text, given, **numbers)
    return peak_bytes(given.device)


def _measure(
    systems: dict[str, Any],
    batch: int,
    rounds: int,
    tokens: int,
    words: int,
    numbers: dict[str, Any],
) -> dict[str, Any]:
    """All systems at one batch size, in turn, round after round; one more round warms them up."""
    config = systems[OURS].model.config
    text, given = _inputs(systems[OURS], batch, tokens, words)
    memory = torch.ones(_READ_BYTES // 4, device=given.device)
    rates: dict[str, list[float]] = {name: [] for name in systems}
    read_rates: list[float] = []
    title, total = f"bench sample, batch {batch}", (rounds + 1) * len(systems)
    with progress(title, total, unit="drawings", is_shown=True) as advance:
        for number in range(rounds + 1):
            names = list(systems)
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                stamps = systems[name].draw(text, given, **numbers)
                gc.collect()
                if number:
                    rates[name].append(batch * (len(stamps) - 1) / (stamps[-1] - stamps[0]))
                advance(1)
            if number:
                read_rates.append(_bytes_per_second(memory))

    def beside_bound(name: str) -> dict[str, float]:
        step_bytes = systems[name].bytes_per_step(batch, words, config.num_tokens - tokens / 2)
        shares = [rate * step_bytes / batch / read for rate, read in zip(rates[name], read_rates)]
        return {
            "bytes_per_step": step_bytes,
            "bound_tokens_per_second": statistics.median(read_rates) / step_bytes * batch,
            "bandwidth_share": statistics.median(shares),
        }

    return {
        "batch": batch,
        "tokens_per_second": {name: statistics.median(r) for name, r in rates.items()},
        "images_per_second": {
            name: statistics.median(r) / config.num_tokens for name, r in rates.items()
        },
        "tokens_per_second_of_rounds": rates,
        "ratios": {
            name: statistics.median(a / b for a, b in zip(rates[OURS], rates[name]))
            for name in systems
            if name != OURS
        },
        "read_bytes_per_second": statistics.median(read_rates),
        **beside_bound(OURS),
        **({"int8": beside_bound(INT8)} if INT8 in systems else {}),
    }


def _bytes_per_second(memory: Tensor) -> float:
    """How fast this device reads memory, the best of three sums over 256 MiB."""
    seconds = []
    for _ in range(3):
        started_at = seconds_when_done(memory.device)
        float(memory.sum())
        seconds.append(seconds_when_done(memory.device) - started_at)
    return memory.numel() * memory.element_size() / min(seconds)


def sample_table(result: dict[str, Any]) -> Table:
    """The result of `bench_sample` for people."""
    drawn = f"{result['tokens_drawn']} of {result['tokens_per_image']} tokens"
    drawn += f" with guidance {result['guidance']:g}" if result["text_tokens"] else " without text"
    dtypes = result["dtype"]
    if len(result["parameters"]) > 1 and result["peers_dtype"] != dtypes:
        dtypes += f" (the others {result['peers_dtype']}, their faster one here)"
    table = Table(
        title=f"Drawing {drawn}, {dtypes}, on {result['device']}",
        caption="peak: of ours alone, weights included",
    )
    for name in ("batch", "sampler"):
        table.add_column(name)
    columns = ("parameters", "tokens/s", "images/s", "ours is", "of the memory bound", "peak GiB")
    for name in columns:
        table.add_column(name, justify="right")
    for measured in result["batches"]:
        for name, rate in measured["tokens_per_second"].items():
            is_ours = name == OURS
            peak = measured["peak_bytes"] if is_ours else None
            bounded = {OURS: measured, INT8: measured.get("int8")}.get(name)
            table.add_row(
                str(measured["batch"]),
                name,
                f"{result['parameters'][name] / 1e6:,.1f}M",
                f"{rate:.1f}",
                f"{measured['images_per_second'][name]:.3f}",
                "" if is_ours else f"{measured['ratios'][name]:.2f}x",
                ""
                if bounded is None
                else f"{bounded['bandwidth_share']:.0%} of {bounded['bound_tokens_per_second']:.0f}"
                " tokens/s",
                "" if peak is None else f"{peak / 2**30:.2f}",
            )
    if result["left_out"]:
        table.caption += f"; without {' and '.join(result['left_out'])}: they draw from a text only"
    return table
