"""Who am I among the ranks: read from the launcher's environment, torch only where it is needed."""

from __future__ import annotations

import os
import random


def rank() -> int:
    """This process's number over all nodes; 0 when started by hand."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch (CPU and CUDA) with `seed + rank`.

    Weights are made before this is called with a rank, so that all ranks start from the same ones.
    """
    import numpy
    import torch

    random.seed(seed + rank)
    numpy.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
