"""Latents for `lgpt bench train`, read as training reads them: the run's own, or random ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lgpt.core.distributed import rank, world_size
from lgpt.core.logging import get_logger
from lgpt.data.latent_cache import LatentCache
from lgpt.data.latent_cache_writer import MANIFEST, CachePlan, LatentCacheWriter
from lgpt.models.latent_gpt import LatentGPTConfig
from lgpt.settings.phases import TransformerRun
from lgpt.training.latent_batches import TrainingLatents
from lgpt.training.places import micro_batches_of

_log = get_logger(__name__)

_PICTURES = 512  # of the random cache; 10 MB with 20 words of width 512


@dataclass(frozen=True)
class CacheSource:
    """Where latents are read: the folder of one split, and what it is, for people."""

    folder: Path
    remark: str


@contextmanager
def training_cache(
    run: TransformerRun, config: LatentGPTConfig, words: int
) -> Iterator[CacheSource]:
    """The run's own cache where it is there and fits the model, else a temporary random one.

    Args:
        run: Its `latent_cache` and `text.cache_dtype` are taken.
        config: The model whose tokens and text are wanted.
        words: Text tokens a picture of a random cache.

    Raises:
        DataError: The run's cache is damaged.
    """
    own = None if run.latent_cache is None else run.latent_cache / "train"
    if own is not None and (own / MANIFEST).exists():
        found = _shape_of(LatentCache.open(own, with_text=config.text_width is not None))
        if found == _wanted(config):
            yield CacheSource(own, str(own))
            return
        _log.warning(
            "%s has %s, the model wants %s: random latents are read instead.",
            *(own, found, _wanted(config)),
        )
    with tempfile.TemporaryDirectory(prefix="lgpt-bench-") as folder:
        split = Path(folder) / "train"
        _write_random_cache(split, config, words, run.text.cache_dtype)
        yield CacheSource(split, "a temporary cache of random latents")


def _wanted(config: LatentGPTConfig) -> dict[str, Any]:
    return {
        "grid": (config.grid_height, config.grid_width),
        "codes": config.codebook_size,
        "text_width": config.text_width,
    }


def _shape_of(cache: LatentCache) -> dict[str, Any]:
    return {"grid": cache.grid, "codes": cache.codebook_size, "text_width": cache.text_width}


def _write_random_cache(folder: Path, config: LatentGPTConfig, words: int, text_dtype: str) -> None:
    """With the writer of `lgpt prepare`; every picture has a caption of its own."""
    has_text = config.text_width is not None
    plan = CachePlan(
        fingerprint={"made_by": "lgpt bench train"},
        dataset="random",
        split="train",
        items=_PICTURES,
        crops=1,
        grid=(config.grid_height, config.grid_width),
        codebook_size=config.codebook_size,
        downsample_factor=1,
        different_captions=_PICTURES,
        text_dtype=text_dtype if has_text else None,
    )
    writer, numbers = LatentCacheWriter(folder, plan, rank=0, world=1), np.random.default_rng(0)
    for chunk in writer.begin(lambda: None):
        count = chunk.stop - chunk.first
        if chunk.kind == "images":
            shape = (count, 1, config.num_tokens)
            none = np.zeros(0, np.int64)
            writer.write_chunk(
                chunk,
                tokens=numbers.integers(config.codebook_size, size=shape).astype(plan.tokens_dtype),
                items=np.arange(chunk.first, chunk.stop),
                bad_items=none,
                bad_reasons=none.astype(np.str_),
            )
        else:
            text = torch.randn(count * words, config.text_width or 0).to(getattr(torch, text_dtype))
            writer.write_chunk(
                chunk,
                embeddings=text.view(torch.int16).numpy(),
                lengths=np.full(count, words),
                cut=np.array(0),
            )
    names = [str(number) for number in range(_PICTURES)]
    writer.finish(names, [(name,) for name in names])
    writer.remove_parts()


class CachedBatches:
    """This rank's micro batches of a cache, one an optimizer step, as `lgpt train` reads them.

    Attributes:
        words: Text tokens of every batch so far, its longest caption's.
    """

    def __init__(self, task: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        cache = LatentCache.open(task["cache"], with_text=task["model"]["text_width"] is not None)
        self._latents = TrainingLatents(cache, task["seed"], task["cond_drop"])
        self._micro_batch, self._device, self._dtype = task["micro_batch"], device, dtype
        self.words: list[int] = []

    def next(self) -> tuple[Tensor, tuple[Any, ...]]:
        """Tokens, and text with its mask and what is dropped of it."""
        (places,) = micro_batches_of(
            len(self.words),
            global_batch=self._micro_batch * world_size(),
            micro_batch=self._micro_batch,
            rank=rank(),
            world=world_size(),
        )
        batch = self._latents.at(places).to(self._device, self._dtype)
        text, mask = batch.latents.text, batch.latents.text_mask
        self.words.append(0 if text is None else text.shape[1])
        return batch.latents.tokens, (text, mask, batch.null_text)
