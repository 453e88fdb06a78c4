"""`lgpt bench loader`: how fast random training batches come out of a run's latent cache.

Read as training reads them (`TrainingLatents`: order, crop, caption, drop), in one thread, without
a model behind it. A rate well above the one at which the model trains means that the loader is not
what training waits for.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, Optional

import numpy as np
from rich.table import Table

from lgpt.core.errors import SettingsError
from lgpt.data.latent_cache import LatentCache
from lgpt.engine.memory import resident_bytes
from lgpt.settings.phases import TransformerRun
from lgpt.training.latent_batches import TrainingLatents

_MIB = 2**20


def bench_loader(run: TransformerRun, *, batches: int, rounds: int) -> dict[str, Any]:
    """Measure the opening of `run.latent_cache` and random batches of its training split.

    Args:
        run: Its cache, conditioning and `batch.micro_batch_images` are taken.
        batches: Batches a round.
        rounds: Medians over them are given. The first may read from the disk, the others find much
            of it in memory, as an epoch of training does after the first.

    Returns:
        JSON values: seconds, bytes, batches, images, picture tokens and words (text embeddings) a
        second. `open_resident_bytes` is what opening adds to the process's resident memory;
        `read_resident_bytes` what the batches then add, most of it pages of the files, which the
        system takes back when it needs them; `read_own_bytes` without those. The three are None
        where there is no /proc.

    Raises:
        DataError: The cache is missing, unfinished or damaged.
        SettingsError: The run config names no cache.
    """
    if run.latent_cache is None:
        raise SettingsError(
            "latent_cache is not set, so there is no cache to read; give the folder that `lgpt "
            "prepare` wrote, for example latent_cache=runs/latents."
        )
    batch_images = run.batch.micro_batch_images
    has_text = run.conditioning == "text_conditional"
    before = resident_bytes()
    started_at = time.perf_counter()
    cache = LatentCache.open(run.latent_cache / "train", with_text=has_text)
    latents = TrainingLatents(cache, run.seed, run.transformer.cond_drop)
    open_seconds = time.perf_counter() - started_at
    opened = resident_bytes()
    first_seconds, seconds, words = 0.0, [], 0
    for number in range(rounds):
        started_at = time.perf_counter()
        for index in range(number * batches, (number + 1) * batches):
            places = np.arange(index * batch_images, (index + 1) * batch_images)
            batch = latents.at(places).latents
            if index == 0:
                first_seconds = time.perf_counter() - started_at
            words += 0 if batch.text_mask is None else int(batch.text_mask.sum())
        seconds.append(time.perf_counter() - started_at)
    read = resident_bytes()
    batches_per_second = batches / statistics.median(seconds)
    tokens = cache.grid[0] * cache.grid[1]
    return {
        "cache": str(run.latent_cache / "train"),
        "cache_bytes": sum(cache.manifest["files"].values()),
        "pictures": len(cache),
        "crops": cache.crops,
        "captions": sum(cache.num_captions(item) for item in range(len(cache))),
        "text_width": cache.text_width,
        "batch_images": batch_images,
        "tokens_per_image": tokens,
        "batches_per_round": batches,
        "rounds": rounds,
        "open_seconds": open_seconds,
        "first_batch_seconds": first_seconds,
        "batches_per_second": batches_per_second,
        "batches_per_second_of_rounds": [batches / s for s in seconds],
        "images_per_second": batches_per_second * batch_images,
        "tokens_per_second": batches_per_second * batch_images * tokens,
        "words_per_second": batches_per_second * words / (rounds * batches),
        "open_resident_bytes": _growth(before, opened, 0),
        "read_resident_bytes": _growth(opened, read, 0),
        "read_own_bytes": _growth(opened, read, 1),
    }


def loader_table(result: dict[str, Any]) -> Table:
    """The result of `bench_loader` for people."""
    table = Table(title=f"Random batches from {result['cache']}")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row(
        "cache",
        f"{result['pictures']:,} pictures x {result['crops']} crop(s), "
        f"{result['captions']:,} captions, {result['cache_bytes'] / _MIB:,.1f} MiB",
    )
    table.add_row("opening", f"{1000 * result['open_seconds']:.1f} ms")
    table.add_row("first batch", f"{1000 * result['first_batch_seconds']:.1f} ms")
    table.add_row(
        f"batches of {result['batch_images']} images", f"{result['batches_per_second']:,.1f} /s"
    )
    table.add_row("images", f"{result['images_per_second']:,.0f} /s")
    table.add_row("picture tokens", f"{result['tokens_per_second']:,.0f} /s")
    table.add_row("words of captions", f"{result['words_per_second']:,.0f} /s")
    table.add_row("resident memory by opening", _mib(result["open_resident_bytes"]))
    table.add_row("resident memory by reading", _mib(result["read_resident_bytes"]))
    table.add_row("of it not file pages", _mib(result["read_own_bytes"]))
    return table


def _mib(count: Optional[int]) -> str:
    return "unknown" if count is None else f"{count / _MIB:+,.1f} MiB"


def _growth(
    before: Optional[tuple[int, int]], after: Optional[tuple[int, int]], which: int
) -> Optional[int]:
    return None if before is None or after is None else after[which] - before[which]
