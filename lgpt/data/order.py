"""The endless order in which training reads its items, the same for every number of ranks.

Places 0, 1, 2, ... of the whole run are epochs one after the other; each epoch is a permutation of
all items. Item, caption and crop follow from (seed, place) alone, so a run that resumes, or goes on
with more ranks, reads on exactly where it was.

Only raw Philox words are used: numpy guarantees that stream over its versions, but not those of
`Generator.permutation` or `integers`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Callable, Union

import numpy as np

# What a Philox key is used for, so that orders and choices of one seed are independent.
_ORDER, _CHOICE = 0, 1
_EPOCHS_KEPT = 4


class SampleOrder:
    """Epochs of permutations, one after the other.

    Args:
        num_items: Items an epoch.
        seed: Other seeds give other, independent orders.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        assert num_items >= 1, "an order needs items; empty datasets are refused when opened"
        self.num_items, self.seed = num_items, seed
        # An instance's own cache: neighbouring batches lie in the same one or two epochs.
        self._permutation = lru_cache(maxsize=_EPOCHS_KEPT)(self._make_permutation)
        self._words = lru_cache(maxsize=_EPOCHS_KEPT)(self._make_words)

    def indices(self, start: int, count: int) -> np.ndarray:
        """Items at the places start .. start + count - 1, int64 [count]."""
        return self._gather(self._permutation, start, count)

    def choices(
        self, start: int, count: int, num_choices_per_item: Union[int, np.ndarray]
    ) -> np.ndarray:
        """A uniform choice for every place: which caption, which crop. int64 [count].

        Two kinds of choices for the same places need two orders with different seeds, or they are
        the same choice.

        Args:
            num_choices_per_item: How many there are to choose from (below 2^32), one number for
                all or one a place [count].
        """
        words = self._gather(self._words, start, count)
        # The upper half times n, shifted: 0 .. n-1, uneven by less than n / 2^32.
        chosen = (words * np.asarray(num_choices_per_item, dtype=np.uint64)) >> np.uint64(32)
        return chosen.astype(np.int64)

    def _gather(self, of_epoch: Callable[[int], np.ndarray], start: int, count: int) -> np.ndarray:
        pieces = []
        end = start + count
        while start < end:
            epoch, offset = divmod(start, self.num_items)
            taken = min(end - start, self.num_items - offset)
            pieces.append(of_epoch(epoch)[offset : offset + taken])
            start += taken
        return np.concatenate(pieces) if pieces else of_epoch(0)[:0]

    def _make_permutation(self, epoch: int) -> np.ndarray:
        words = _philox_words(self.seed, _ORDER, epoch, self.num_items)
        return np.argsort(words, kind="stable").astype(np.int64)

    def _make_words(self, epoch: int) -> np.ndarray:
        return _philox_words(self.seed, _CHOICE, epoch, self.num_items) >> np.uint64(32)


def philox_generator(*parts: int) -> np.random.Philox:
    """A Philox stream of its own for a tuple of whole numbers >= 0."""
    # SeedSequence hashes the parts into the 128 bit key; its algorithm is fixed by numpy's policy.
    return np.random.Philox(np.random.SeedSequence(parts))


def _philox_words(seed: int, use: int, epoch: int, count: int) -> np.ndarray:
    return philox_generator(seed, use, epoch).random_raw(count)
