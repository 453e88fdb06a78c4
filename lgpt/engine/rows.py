"""New rows for a parameter that an engine trains, in everything that DeepSpeed keeps of it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lgpt.core.distributed import rank
from lgpt.engine.masters import master_vectors

_MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def set_rows(
    engine: Any,
    parameter: nn.Parameter,
    rows: Int[Tensor, " n"],
    values: Float[Tensor, "n dim"],
) -> None:
    """Put rows into a parameter as if they had never learned; between two steps.

    Into the weights that forwards use, their float32 masters (also in fp32, where DeepSpeed trains
    a copy), and AdamW's moments, which become 0. All ranks call it, with the same rows.

    Args:
        engine: At ZeRO stage 1, 2 or 3; its optimizer is AdamW.
        parameter: A matrix of its module.
    """
    from deepspeed.runtime.zero import GatheredParameters

    is_stage3 = hasattr(parameter, "ds_tensor")
    shape = parameter.ds_shape if is_stage3 else parameter.shape
    is_new = torch.zeros(shape, dtype=torch.bool, device=values.device)
    is_new[rows] = True
    whole = torch.zeros(shape, device=values.device)
    whole[rows] = values.float()
    if is_stage3:
        _set_stage3_part(parameter, is_new.flatten(), whole.flatten())
    else:
        _set_fragment(engine, parameter, is_new.flatten(), whole.flatten())
    with GatheredParameters([parameter], modifier_rank=0, enabled=is_stage3):
        parameter[rows] = values.to(parameter)


def _set_fragment(engine: Any, parameter: nn.Parameter, is_new: Tensor, whole: Tensor) -> None:
    """Stages 1 and 2: this rank's piece of a group's flat master, where the parameter has one."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return
    flat = master_vectors(engine)[mapping.param_group_index]
    # Not DeepSpeed's safe_set_full_optimizer_state: it (0.19.8) looks the moments up when the first
    # group has done its first step, so it never finds those of the second group.
    state = engine.optimizer.optimizer.state[flat]
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    is_new, whole = (all_of.narrow(0, there.start, there.numel) for all_of in (is_new, whole))
    _put(flat.detach().narrow(0, here.start, here.numel), is_new, whole)
    for key in _MOMENTS:
        _put(state[key].narrow(0, here.start, here.numel), is_new, torch.zeros_like(whole))


def _set_stage3_part(parameter: nn.Parameter, is_new: Tensor, whole: Tensor) -> None:
    """Stage 3: this rank's part, which the last rank fills up with zeros."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    length = parameter.ds_tensor.numel()
    is_new, whole = (
        nn.functional.pad(all_of[rank() * length :][:length], (0, length))[:length]
        for all_of in (is_new, whole)
    )
    master = safe_get_local_fp32_param(parameter).clone()
    _put(master, is_new, whole)
    safe_set_local_fp32_param(parameter, master)
    for key in _MOMENTS:
        moment = safe_get_local_optimizer_state(parameter, key).clone()
        _put(moment, is_new, torch.zeros_like(whole))
        safe_set_local_optimizer_state(parameter, moment, key)


def _put(target: Tensor, is_new: Tensor, values: Tensor) -> None:
    """In place; `target` may lie on the CPU, where it is offloaded to."""
    target.copy_(torch.where(is_new, values, target.to(values.device)))
