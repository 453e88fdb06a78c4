"""Who am I among the ranks: read from the launcher's environment, torch only where it is needed."""

from __future__ import annotations

import os
import random
import re

from lgpt.core.errors import SettingsError


def rank() -> int:
    """This process's number over all nodes; 0 when started by hand."""
    return _number("RANK", default=0, lowest=0)


def local_rank() -> int:
    """This process's number on its node."""
    return _number("LOCAL_RANK", default=0, lowest=0)


def world_size() -> int:
    """How many processes train together."""
    return _number("WORLD_SIZE", default=1, lowest=1)


def _number(variable: str, default: int, lowest: int) -> int:
    text = os.environ.get(variable, str(default))
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < lowest:
        raise SettingsError(
            f"environment variable {variable} = {text!r} must be a whole number of at least "
            f"{lowest}; the launcher sets it: unset it for a command started by hand."
        )
    return int(text)


def is_rank_zero() -> bool:
    """True on the one rank that writes logs, pictures and MLflow."""
    return rank() == 0


def is_launched() -> bool:
    """True under `deepspeed` or `torchrun`; False for a command started by hand."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def barrier() -> None:
    """Wait for all ranks; nothing to wait for in a single process."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def leave_process_group() -> None:
    """The last thing a rank does: wait for all ranks, then end the process group's threads.

    With them a process that has done all its work can be aborted on its way out ("terminate called
    without an active exception", gloo, torch 2.13), and the launcher counts it as failed.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch (CPU and CUDA) with `seed + rank`.

    Weights are made before this is called with a rank, so that all ranks start from the same ones.
    """
    import numpy
    import torch

    random.seed(seed + rank)
    numpy.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
