"""Places of the sample order: every image of a step once, whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from lgpt.training.places import (
    crops_of,
    micro_batches_of,
    padded_batches_of,
    validation_batches_of,
)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_and_micro_batches_cover_a_step_exactly_once(world: int, micro: int):
    places = [
        place
        for rank in range(world)
        for batch in micro_batches_of(3, global_batch=16, micro_batch=micro, rank=rank, world=world)
        for place in batch
    ]
    assert sorted(places) == list(range(48, 64))


@pytest.mark.parametrize(("items", "world"), [(100, 1), (100, 3), (5, 2), (1, 4), (7, 2)])
def test_validation_gives_every_rank_the_same_shapes(items: int, world: int):
    per_rank = [
        validation_batches_of(items, wanted=64, micro_batch=8, rank=rank, world=world)
        for rank in range(world)
    ]
    shapes = {tuple(len(batch) for batch in batches) for batches in per_rank}
    assert len(shapes) == 1
    used = np.concatenate([batch for batches in per_rank for batch in batches])
    assert used.max() < items
    if items >= world:
        assert len(set(used.tolist())) == len(used)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [1, 4, 7])
@pytest.mark.parametrize("items", [1, 5, 13, 64, 101])
def test_padded_batches_count_every_item_once_in_equal_batches(items: int, world: int, micro: int):
    per_rank = [
        padded_batches_of(items, micro_batch=micro, rank=rank, world=world) for rank in range(world)
    ]
    batches = [batch for of_rank in per_rank for batch in of_rank]
    counted = np.concatenate([batch.items[batch.is_counted] for batch in batches])
    assert sorted(counted) == list(range(items))
    assert len({len(of_rank) for of_rank in per_rank}) == 1
    assert {len(batch.items) for batch in batches} == {len(batches[0].items)}
    assert 1 <= len(batches[0].items) <= micro
    assert min(batch.items.min() for batch in batches) >= 0
    padding = sum(int((~batch.is_counted).sum()) for batch in batches)
    assert padding < world * len(per_rank[0]), "less than one a batch"


@pytest.mark.parametrize("crops", [1, 2, 16, 512])
def test_every_epoch_cuts_a_picture_anew(crops: int):
    items = np.arange(300)
    shown = np.stack([crops_of(items, np.full(300, epoch), crops) for epoch in range(crops)])
    for of_picture in shown.T:
        assert sorted(of_picture) == list(range(crops)), "each crop once before any comes again"
    if crops > 1:
        mirrored = (shown % 2).mean(axis=1)
        assert mirrored.min() > 0.4
        assert mirrored.max() < 0.6
