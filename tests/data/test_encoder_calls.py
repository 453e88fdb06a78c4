"""Calls of the image encoder: what is in them, and that nothing waits for what it does not need."""

from __future__ import annotations

import threading

import torch
from PIL import Image
from toy_pictures import ToyPictures

from lgpt.data.encoder_calls import encoder_calls
from lgpt.data.latent_cache_writer import Chunk
from lgpt.data.transforms import ImageTransform, to_unit_range

TRANSFORM = ImageTransform(16, crops=2, crop_scale_min=0.6, flip=True, seed=4)
CHUNKS = [Chunk("images", 0, 10), Chunk("images", 10, 14), Chunk("images", 14, 15)]


def test_calls_hold_the_good_pictures_of_their_chunk_in_order():
    toys = ToyPictures(15, bad=(3, 8, 9, 14))
    calls = list(encoder_calls(CHUNKS, toys, TRANSFORM, pictures=4, workers=2))
    assert [(call.chunk.first, call.items, tuple(call.bad), call.is_last) for call in calls] == [
        (0, (0, 1, 2, 4), (3,), False),
        (0, (5, 6, 7), (8, 9), True),
        (10, (10, 11, 12, 13), (), True),
        (14, (), (14,), True),
    ]
    assert calls[0].bad == {3: "picture3: truncated"}
    assert calls[3].images.shape == (0, 3, 16, 16)
    for call in calls[:3]:
        crops = [TRANSFORM(toys.load(item), item, crop) for item in call.items for crop in (0, 1)]
        expected = to_unit_range(torch.stack([torch.from_numpy(crop) for crop in crops]))
        assert torch.equal(call.images, expected)


class _HeldBack(ToyPictures):
    """Pictures from `first_held` on come only after `release`."""

    def __init__(self, count: int, first_held: int) -> None:
        super().__init__(count)
        self.first_held, self.release = first_held, threading.Event()

    def load(self, index: int) -> Image.Image:
        if index >= self.first_held:
            assert self.release.wait(timeout=60)
        return super().load(index)


def test_the_encoder_need_not_wait_for_the_rest_of_a_chunk():
    toys = _HeldBack(10, first_held=4)
    calls = encoder_calls(CHUNKS[:1], toys, TRANSFORM, pictures=4, workers=1)
    assert next(calls).items == (0, 1, 2, 3)
    toys.release.set()
    assert [call.items for call in calls] == [(4, 5, 6, 7), (8, 9)]


def test_the_next_call_is_made_ready_without_being_asked_for():
    toys = ToyPictures(15)
    is_read = threading.Event()

    def load(index: int) -> Image.Image:
        if index == 14:
            is_read.set()
        return ToyPictures.load(toys, index)

    toys.load = load
    calls = encoder_calls(CHUNKS, toys, TRANSFORM, pictures=10, workers=1)
    # The second chunk's call is joined while the first one is used, which begins the third's.
    next(calls)
    assert is_read.wait(timeout=60)
    calls.close()


def test_closed_early_the_rest_is_not_read():
    toys = _HeldBack(200, first_held=1)
    calls = encoder_calls([Chunk("images", 0, 200)], toys, TRANSFORM, pictures=1, workers=1)
    next(calls)
    toys.release.set()
    calls.close()
    assert toys.loads < 200
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lgpt-")]
