"""What the image encoder is called with, made ready while it works on the call before.

    threads: load, cut      ->  one thread: join, to [-1, 1]  ->  caller: encode, write
    (the chunk after this)      (the call after this)

So the encoder waits only for the very first call, not for a whole chunk, and is not kept waiting
by the joining of pictures either.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lgpt.data.captioned import BadImage, CaptionedDataset
from lgpt.data.latent_cache_writer import Chunk
from lgpt.data.transforms import ImageTransform, to_unit_range


@dataclass(frozen=True)
class EncoderCall:
    """Some pictures of one chunk, in order.

    Attributes:
        images: All crops of picture 0, of picture 1, ..., in [-1, 1]; empty if none was read.
        items: Which pictures these are.
        bad: Pictures that were met on the way and cannot be read, and why.
        is_last: The chunk ends here.
    """

    chunk: Chunk
    images: Float[Tensor, "b 3 H W"]
    items: tuple[int, ...]
    bad: dict[int, str]
    is_last: bool


def encoder_calls(
    chunks: Sequence[Chunk],
    dataset: CaptionedDataset,
    transform: ImageTransform,
    *,
    pictures: int,
    workers: int,
) -> Generator[EncoderCall, None, None]:
    """The calls of these chunks; at least one a chunk. Close it when leaving it early.

    Calls begin anew with every chunk, so what is encoded together follows from the chunk alone.

    Args:
        pictures: Good pictures a call.
        workers: Threads that load and cut.
    """
    calls = _joined(chunks, dataset, transform, pictures, workers)
    try:
        with ThreadPoolExecutor(1, "lgpt-calls") as thread:
            following = thread.submit(next, calls, None)
            while (call := following.result()) is not None:
                following = thread.submit(next, calls, None)
                yield call
    finally:
        calls.close()


def _joined(
    chunks: Sequence[Chunk],
    dataset: CaptionedDataset,
    transform: ImageTransform,
    pictures: int,
    workers: int,
) -> Generator[EncoderCall, None, None]:
    for chunk, readings in _readings(chunks, dataset, transform, workers):
        good: dict[int, np.ndarray] = {}
        bad: dict[int, str] = {}
        for item, reading in zip(range(chunk.first, chunk.stop), readings):
            # Only when another picture comes: a chunk's last call must know that it is the last.
            if len(good) == pictures:
                yield _call(chunk, good, bad, transform, is_last=False)
                good, bad = {}, {}
            try:
                good[item] = reading.result()
            except BadImage as error:
                bad[item] = str(error)
        yield _call(chunk, good, bad, transform, is_last=True)


def _call(
    chunk: Chunk,
    good: dict[int, np.ndarray],
    bad: dict[int, str],
    transform: ImageTransform,
    is_last: bool,
) -> EncoderCall:
    side = transform.resolution
    none = np.zeros((0, 3, side, side), np.uint8)
    pixels = torch.from_numpy(np.concatenate(list(good.values()) or [none]))
    return EncoderCall(chunk, to_unit_range(pixels), tuple(good), bad, is_last)


def _readings(
    chunks: Sequence[Chunk], dataset: CaptionedDataset, transform: ImageTransform, workers: int
) -> Iterator[tuple[Chunk, list[Future[np.ndarray]]]]:
    """Pictures [crops, 3, H, W] of each chunk; the next chunk is read while this one is used."""

    def load(item: int) -> np.ndarray:
        image = dataset.load(item)
        return np.stack([transform(image, item, crop) for crop in range(transform.crops)])

    with ThreadPoolExecutor(max(1, workers), "lgpt-latents") as pool:
        waiting: list[tuple[Chunk, list[Future[np.ndarray]]]] = []
        try:
            for chunk in chunks:
                waiting.append(
                    (chunk, [pool.submit(load, i) for i in range(chunk.first, chunk.stop)])
                )
                if len(waiting) > 1:
                    yield waiting[0]
                    waiting.pop(0)
            while waiting:
                yield waiting[0]
                waiting.pop(0)
        finally:
            for _, readings in waiting:
                for reading in readings:
                    reading.cancel()
