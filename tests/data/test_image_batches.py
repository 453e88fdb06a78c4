"""Batches of pictures: right, remembered, and without the bad ones."""

from __future__ import annotations

import numpy as np
import pytest
from toy_pictures import ToyPictures

from lgpt.core.errors import DataError
from lgpt.data import image_batches
from lgpt.data.image_batches import ImageBatches
from lgpt.data.transforms import ImageTransform

TRANSFORM = ImageTransform(8, crops=3, crop_scale_min=0.5, flip=True, seed=0)
ITEMS, CROPS = np.array([4, 0, 4, 9]), np.array([2, 0, 1, 2])


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_batches_hold_the_asked_crops(monkeypatch: pytest.MonkeyPatch, workers: int, budget: int):
    monkeypatch.setattr(image_batches, "_MEMORY_BUDGET_BYTES", budget)
    toys = ToyPictures(10)
    batches = ImageBatches(toys, TRANSFORM, workers=workers, max_bad_images=0)
    expected = [TRANSFORM(toys.load(int(i)), int(i), int(c)) for i, c in zip(ITEMS, CROPS)]
    toys.loads = 0
    batches.prefetch(ITEMS[:2], CROPS[:2])
    for _ in range(2):
        assert (batches.items(ITEMS, CROPS) == np.stack(expected)).all()
    assert toys.loads == (4 if budget else 8)


@pytest.mark.parametrize("workers", [0, 3])
def test_bad_pictures_give_way_to_the_next_good_one(workers: int):
    toys = ToyPictures(10, bad=(8, 9, 3))
    batches = ImageBatches(toys, TRANSFORM, workers=workers, max_bad_images=3)
    items, crops = np.array([8, 3, 5, 8]), np.array([0, 1, 2, 0])
    got = batches.items(items, crops)
    instead = [TRANSFORM(toys.load(i), i, int(c)) for i, c in zip((0, 4, 5, 0), crops)]
    assert (got == np.stack(instead)).all()
    assert batches.shown(items).tolist() == [0, 4, 5, 0]
    assert len(batches.bad_images) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_pictures_are_an_error_with_their_names(workers: int):
    toys = ToyPictures(10, bad=(1, 2, 3))
    batches = ImageBatches(toys, TRANSFORM, workers=workers, max_bad_images=2)
    with pytest.raises(DataError, match=r"(?s)picture1: truncated.*max_bad_images \(2\)"):
        batches.items(np.arange(10), np.zeros(10, int))


def test_nothing_but_bad_pictures_is_an_error_and_not_an_endless_search():
    batches = ImageBatches(ToyPictures(3, bad=(0, 1, 2)), TRANSFORM, workers=0, max_bad_images=9)
    with pytest.raises(DataError, match="Not one picture"):
        batches.items(np.array([1]), np.array([0]))
