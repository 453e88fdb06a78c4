"""Moments at which a device has done what it was asked to: what measurements count between."""

from __future__ import annotations

import time

import torch


def seconds_when_done(device: torch.device) -> float:
    """`time.perf_counter()`, on a GPU only after all that was queued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
