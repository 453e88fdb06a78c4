"""Builds a latent cache of toy pictures with tiny encoders; also a program that can be killed.

python toy_cache.py FOLDER SECONDS_A_CALL
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from toy_pictures import ToyPictures

from lgpt.data.latent_cache import build_latent_cache
from lgpt.data.transforms import ImageTransform

TRANSFORM = ImageTransform(16, crops=2, crop_scale_min=0.6, flip=True, seed=4)
BAD = (3, 300)
COUNT = 700
WIDTH = 6
VOCABULARY = ["number", "red", "green", "blue", "cat", "dog", "big"]


def fingerprint() -> dict[str, Any]:
    return {"weights": "w1", "transform": TRANSFORM.describe(), "text_encoder": "t1"}


def encode_images(images: Tensor) -> Tensor:
    """Mean brightness of 4 x 4 patches as one of 300 codes."""
    patches = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)[:, 0]
    return ((patches + 1) * 150).long().clamp(0, 299)


def encode_captions(captions: list[str]) -> tuple[Tensor, Tensor]:
    """A vector a word that tells the word and its place."""
    words = [caption.split() for caption in captions]
    longest = max(map(len, words)) + 3
    text = torch.full((len(words), longest, WIDTH), 7.0)
    for row, caption in enumerate(words):
        for place, word in enumerate(caption):
            code = VOCABULARY.index(word) if word in VOCABULARY else 100 + int(word)
            text[row, place] = code + place / 10 + torch.arange(WIDTH) / 100
    mask = torch.arange(longest)[None] < torch.tensor([len(caption) for caption in words])[:, None]
    return text, mask


def build(
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    seconds_a_call: float = 0.0,
    calls: Optional[list[int]] = None,
    **changed: Any,
) -> None:
    """The toy cache; `calls` collects how many pictures each encoder call got."""

    def slow_encode(images: Tensor) -> Tensor:
        time.sleep(seconds_a_call)
        if calls is not None:
            calls.append(len(images))
        return encode_images(images)

    arguments = {
        "dataset": ToyPictures(COUNT, bad=BAD),
        "transform": TRANSFORM,
        "encode_images": slow_encode,
        "encode_captions": encode_captions,
        "fingerprint": fingerprint(),
        "codebook_size": 300,
        "downsample_factor": 4,
        "text_dtype": "float16",
        "max_bad_images": 2,
        **changed,
    }
    build_latent_cache(folder, rank=rank, world=world, barrier=barrier, **arguments)


def build_with_ranks(folder: Path, world: int) -> None:
    """All ranks as threads of this process."""
    meeting = threading.Barrier(world, timeout=60)
    ranks = [
        threading.Thread(
            target=build,
            args=(folder,),
            kwargs={"rank": rank, "world": world, "barrier": meeting.wait},
        )
        for rank in range(world)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()


if __name__ == "__main__":
    build(Path(sys.argv[1]), seconds_a_call=float(sys.argv[2]))
