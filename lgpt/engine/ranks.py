"""Small collectives over all ranks; in a group of one they cost nothing and mean the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist


def mean_over_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Each value's mean over all ranks, in one all-reduce; every rank passes the same keys."""
    if not values:
        return {}
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(packed)
        packed /= dist.get_world_size()
    return dict(zip(values, packed.tolist()))


def max_over_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Each value's maximum over all ranks (a flag is 0 or 1), in one all-reduce."""
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return dict(zip(values, packed.tolist()))


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because the process at its other end is gone."""
    # gloo has no exception of its own; NCCL has one.
    return isinstance(error, dist.DistBackendError) or bool(
        re.search(r"gloo.*(closed by peer|reset by peer|Broken pipe)|recvFully|writev", str(error))
    )


def gather_to_rank_zero(value: Any) -> list[Any]:
    """Small CPU objects of all ranks, in rank order; an empty list on the other ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered if dist.get_rank() == 0 else []


def broadcast_from_rank_zero(value: Any) -> Any:
    """Rank 0's object on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
