"""Moments at which a device has done what it was asked to: what measurements count between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable

import torch


def seconds_when_done(device: torch.device) -> float:
    """`time.perf_counter()`, on a GPU only after all that was queued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def collectives_timed() -> Iterator[Callable[[], float]]:
    """Gives a function: the seconds that DeepSpeed's collectives in this block took together.

    DeepSpeed's own log of them, which waits for each before the next begins: nothing overlaps.
    """
    from deepspeed.comm.comm import comms_logger

    was_enabled, was_all = comms_logger.enabled, comms_logger.prof_all
    kept, comms_logger.comms_dict = comms_logger.comms_dict, {}
    comms_logger.enabled = comms_logger.prof_all = True
    seen = comms_logger.comms_dict
    try:
        # A name's records by message size: [count, milliseconds of each, ...].
        yield (
            lambda: (
                sum(sum(record[1]) for sizes in seen.values() for record in sizes.values()) / 1e3
            )
        )
    finally:
        comms_logger.enabled, comms_logger.prof_all = was_enabled, was_all
        comms_logger.comms_dict = kept
