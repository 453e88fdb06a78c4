"""The search for the largest micro batch, on memory that is a formula."""

from __future__ import annotations

from typing import Optional

import pytest

from lgpt.core.errors import OutOfMemoryError
from lgpt.training.bench_micro_batch import largest_micro_batch


def _search(fits_up_to: int, limit: Optional[float]) -> tuple[int, list[int], list[int]]:
    """Answer, sizes that ran, sizes that were started; a size takes 100 + 10 a picture."""
    started: list[int] = []

    def peak_of(size: int) -> int:
        started.append(size)
        if size > fits_up_to:
            raise OutOfMemoryError("full")
        return 100 + 10 * size

    answer, tried = largest_micro_batch(peak_of, limit)
    assert all(one["peak_bytes"] == 100 + 10 * one["micro_batch"] for one in tried)
    return answer, [one["micro_batch"] for one in tried], started


def test_between_the_last_that_fits_and_the_first_that_does_not_it_is_halved():
    answer, ran, started = _search(13, None)
    assert (answer, ran) == (13, [1, 2, 4, 8, 12, 13])
    assert started == [1, 2, 4, 8, 16, 12, 14, 13]


@pytest.mark.parametrize("most", [*range(1, 70), 127, 128, 1000])
def test_the_answer_is_at_most_an_eighth_too_small(most: int):
    for limit in (None, 100.0 + 10 * most + 1):
        answer, _, started = _search(most if limit is None else 10**6, limit)
        assert answer <= most <= max(answer, answer + answer // 8)
        assert limit is None or max(started) <= max(2, most)


def test_what_would_take_too_much_on_the_line_is_not_started():
    answer, ran, started = _search(10**6, 100.0 + 10 * 13 + 1)
    assert (answer, started) == (13, ran)
    assert max(started) == 13


def test_what_takes_more_than_the_limit_does_not_fit():
    with pytest.raises(OutOfMemoryError, match="Not even one picture fits"):
        _search(10**6, 105.0)
    assert _search(10**6, 115.0) == (1, [1], [1, 2])


def test_where_nothing_fits_the_way_out_is_told():
    with pytest.raises(OutOfMemoryError, match="Not even one picture fits"):
        _search(0, None)
