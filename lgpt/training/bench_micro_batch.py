"""The largest micro batch that fits, for `lgpt bench train --find-micro-batch`."""

from __future__ import annotations

import math
from typing import Any, Callable, Optional

from lgpt.core.errors import OutOfMemoryError
from lgpt.core.logging import get_logger

_log = get_logger(__name__)
_GIB = 2**30
_CLOSE_ENOUGH = 8  # the answer is at most an eighth too small


def largest_micro_batch(
    peak_of: Callable[[int], int], limit_bytes: Optional[float]
) -> tuple[int, list[dict[str, Any]]]:
    """1, 2, 4, ... until one does not fit, then halving between it and the last that did.

    Args:
        peak_of: Trains with a micro batch; the most bytes it took. Raises `OutOfMemoryError`.
        limit_bytes: A size does not fit when it takes so much. From the third on it is not even
            tried when it would, on the line through the last two that ran. None tries until memory
            is full.

    Returns:
        The largest, and every size that fits and ran with its `peak_bytes`.

    Raises:
        OutOfMemoryError: Not even one picture fits.
    """
    tried: list[dict[str, Any]] = []

    def fits(size: int) -> bool:
        limit = math.inf if limit_bytes is None else limit_bytes
        if (expected := _expected_bytes(tried, size)) >= limit:
            _log.info("micro batch %d: would take %.2f GiB", size, expected / _GIB)
            return False
        try:
            peak = peak_of(size)
        except OutOfMemoryError:
            _log.info("micro batch %d: did not fit", size)
            return False
        _log.info("micro batch %d: %.2f GiB", size, peak / _GIB)
        if peak >= limit:
            return False
        tried.append({"micro_batch": size, "peak_bytes": peak})
        return True

    too_large = 1
    while fits(too_large):
        too_large *= 2
    if not tried:
        raise OutOfMemoryError("Not even one picture fits; take a smaller model or more memory.")
    fitting = too_large // 2
    while too_large - fitting > max(1, fitting // _CLOSE_ENOUGH):
        middle = (fitting + too_large) // 2
        if fits(middle):
            fitting = middle
        else:
            too_large = middle
    return fitting, tried


def _expected_bytes(tried: list[dict[str, Any]], size: int) -> float:
    """On the line through the last two sizes; after a single one nothing is known of the next."""
    if len(tried) < 2:
        return 0.0
    (small, less), (large, more) = ((one["micro_batch"], one["peak_bytes"]) for one in tried[-2:])
    return float(more + (more - less) / (large - small) * (size - large))
