"""What this rank holds of a model's parameters in DeepSpeed's flat vectors, read and written.

ZeRO-1 and 2 hold a stretch of every parameter group, so some parameters whole, one or two in part
and most not at all; ZeRO-3 holds its share of every parameter. DeepSpeed's own addresses are used,
so nothing here depends on how it pads (0.18 to 0.19.8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lgpt.core.distributed import rank
from lgpt.engine.masters import master_vectors


class Stretch(NamedTuple):
    """Elements `start` to `start + length` of a parameter.

    They lie in this rank's flat vector number `vector` from `place` on.
    """

    name: str
    start: int
    length: int
    vector: int
    place: int

    def of(self, vectors: Sequence[Tensor]) -> Tensor:
        """The elements, as a view."""
        return vectors[self.vector][self.place : self.place + self.length]


def trained_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter that the optimizer owns, by its first name."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def stretches(engine: Any) -> Iterator[Stretch]:
    """What this rank's optimizer holds, padding left out."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            positions = engine.optimizer.grad_position
            vector, place, length = positions[engine.optimizer.get_param_id(parameter)]
            start = rank() * length
            length = min(length, parameter.ds_numel - start)
        else:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            vector, place = mapping.param_group_index, mapping.hp_fragment_address.start
        if length > 0:
            yield Stretch(name, start, length, vector, place)


def moment_vectors(engine: Any, name: str) -> list[Tensor]:
    """AdamW's `exp_avg` or `exp_avg_sq` beside the masters; zeros where it has not stepped yet."""
    found = []
    for vector in master_vectors(engine):
        state = engine.optimizer.optimizer.state[vector]
        if name not in state:
            state[name] = torch.zeros_like(vector.data)
        found.append(state[name])
    return found


def set_adam_steps(engine: Any, steps: float) -> None:
    """How many steps AdamW has taken, which its bias correction counts by."""
    for vector in master_vectors(engine):
        # Where torch's own load puts it for the fused AdamW.
        step = torch.tensor(steps, dtype=torch.float32, device=vector.device)
        engine.optimizer.optimizer.state[vector]["step"] = step


def set_counters(engine: Any, counters: Mapping[str, int]) -> None:
    """DeepSpeed's own counts, which it saves again: global_steps, global_samples, skipped_steps."""
    for name, count in counters.items():
        assert hasattr(engine, name), name
        setattr(engine, name, count)


def part_everything(engine: Any) -> None:
    """Before anything is written: under ZeRO-3 nothing stays gathered. All ranks call it."""
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()


@torch.no_grad()
def write_fixed(engine: Any, name: str, start: int, values: Tensor) -> None:
    """Write elements of a buffer or a frozen parameter, as far as this rank holds them."""
    target, offset = _fixed(engine, name)
    flat = target.data.reshape(-1)
    assert flat.data_ptr() == target.data_ptr(), f"{name} is not laid out in one piece"
    first = max(start, offset)
    last = min(start + values.numel(), offset + flat.numel())
    if first < last:
        flat[first - offset : last - offset] = values[first - start : last - start]


def fixed_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Every buffer that is saved and every frozen parameter."""
    stored = engine.module.state_dict().keys()
    shapes = {n: tuple(b.shape) for n, b in engine.module.named_buffers() if n in stored}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            shapes[name] = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return shapes


def swaps_to_disk(engine: Any) -> bool:
    """Whether masters or weights lie on NVMe, where they cannot be reached at will."""
    return bool(engine.zero_nvme_offload_optimizer()) or bool(
        getattr(engine.optimizer, "params_in_nvme_and_cpu", False)
    )


def _fixed(engine: Any, name: str) -> tuple[Tensor, int]:
    """A buffer or this rank's part of a frozen parameter, and where in the whole that begins."""
    owner, _, last = name.rpartition(".")
    tensor: Any = getattr(engine.module.get_submodule(owner), last)
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor, rank() * tensor.ds_tensor.numel()
    return tensor, 0
