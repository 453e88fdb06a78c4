"""How far a long piece of work is: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

from lgpt.core.logging import get_logger

_log = get_logger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress(
    title: str, total: int, *, unit: str, is_shown: bool
) -> Iterator[Callable[[int], None]]:
    """Gives `advance(count)`, to be called as the work gets done.

    Args:
        title: What is being done.
        total: How many units there are to do.
        unit: What is counted, in the plural.
        is_shown: False on all ranks but one, and where nobody asked.
    """
    if not is_shown or total == 0:
        yield lambda count: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=title, unit=f" {unit}", dynamic_ncols=True) as bar:

            def advance(count: int) -> None:
                bar.update(count)

            yield advance
    else:
        yield _Lines(title, total, unit).advance


class _Lines:
    """A line every half minute, and one at the end."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0
        self._started_at = self._said_at = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._done < self._total and now - self._said_at < _SECONDS_BETWEEN_LINES:
            return
        self._said_at = now
        elapsed_seconds = max(now - self._started_at, 1e-9)
        rate = max(self._done / elapsed_seconds, 1e-9)
        left_seconds = (self._total - self._done) / rate
        _log.info(
            "%s: %d of %d %s, %s, %s",
            self._title,
            self._done,
            self._total,
            self._unit,
            f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each",
            f"{left_seconds:.0f} s left"
            if self._done < self._total
            else f"{elapsed_seconds:.0f} s",
        )
