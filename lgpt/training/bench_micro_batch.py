"""The largest micro batch that fits, for `lgpt bench train --find-micro-batch`."""

from __future__ import annotations

from typing import Any, Callable, Optional

from lgpt.core.errors import OutOfMemoryError
from lgpt.core.logging import get_logger

_log = get_logger(__name__)
_GIB = 2**30
_CLOSE_ENOUGH = 8  # the answer is at most an eighth too small


def largest_micro_batch(
    peak_of: Callable[[int], int], limit_bytes: Optional[float], fixed_bytes: float
) -> tuple[int, list[dict[str, Any]]]:
    """1, 2, 4, ... until one does not fit, then halving between it and the last that did.

    Args:
        peak_of: Trains with a micro batch; the most bytes it took. Raises `OutOfMemoryError`.
        limit_bytes: A size is not tried when it would take so much, on the line through the two
            largest that ran; None tries until memory is full.
        fixed_bytes: Of the peak, at least so many do not grow with the batch: all that is known of
            the line after the first size.

    Returns:
        The largest, and every size that ran with its `peak_bytes`.

    Raises:
        OutOfMemoryError: Not even one picture fits.
    """
    tried: list[dict[str, Any]] = []

    def fits(size: int) -> bool:
        expected = _expected_bytes(tried, size, fixed_bytes)
        if limit_bytes is not None and expected >= limit_bytes:
            _log.info("micro batch %d: would take %.2f GiB", size, expected / _GIB)
            return False
        try:
            peak = peak_of(size)
        except OutOfMemoryError:
            _log.info("micro batch %d: did not fit", size)
            return False
        tried.append({"micro_batch": size, "peak_bytes": peak})
        _log.info("micro batch %d: %.2f GiB", size, peak / _GIB)
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


def _expected_bytes(tried: list[dict[str, Any]], size: int, fixed_bytes: float) -> float:
    """On the line through the last two sizes, or through the fixed bytes and the only one."""
    if not tried:
        return 0.0
    points = [(0, fixed_bytes), *((one["micro_batch"], one["peak_bytes"]) for one in tried)]
    (small, less), (large, more) = points[-2:]
    return float(more + (more - less) / (large - small) * (size - large))
