"""ZeRO checkpoints in DeepSpeed's format without a training: to try conversion at any size.

Written one rank after the other, so the memory of one rank's shard is enough. The layout is that
of deepspeed 0.19.8 in bf16 with Adam, which the tests compare with real saves; the numbers are
random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgpt.core.errors import SettingsError

Groups = Sequence[Mapping[str, tuple[int, ...]]]


def write_synthetic_shards(
    folder: Path, groups: Groups, *, stage: int, ranks: int, seed: int = 0
) -> None:
    """Write what `engine.save_checkpoint` of so many ranks leaves in its tag's folder.

    Args:
        folder: The tag's folder; is made.
        groups: Names and shapes of each optimizer group, in its order.
        stage: 2 or 3.
        ranks: How many ranks seem to have saved it.
        seed: Of the numbers.

    Raises:
        SettingsError: Another stage.
    """
    if stage not in (2, 3):
        raise SettingsError(f"stage {stage} cannot be written; allowed: 2, 3.")
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for rank in range(ranks):
        vectors = [
            torch.randn(_vector_length(group, stage, ranks, rank), generator=generator)
            for group in groups
        ]
        state = _stage3_state(vectors, ranks) if stage == 3 else _stage2_state(vectors, ranks)
        held = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}
        torch.save(held, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            path = folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            torch.save(_model_state(groups, ranks, is_partitioned=True), path)
    if stage == 2:
        model = _model_state(groups, ranks, is_partitioned=False)
        torch.save(model, folder / "mp_rank_00_model_states.pt")


def _vector_length(group: Mapping[str, tuple[int, ...]], stage: int, ranks: int, rank: int) -> int:
    """Elements that one rank holds of a group."""
    sizes = [math.prod(shape) for shape in group.values()]
    if stage == 3:
        return sum(math.ceil(size / ranks) for size in sizes)
    # Padded to a multiple of 2 x ranks, but saved without the padding at the end.
    part = 2 * math.ceil(sum(sizes) / (2 * ranks))
    return min(part, max(sum(sizes) - rank * part, 0))


def _stage2_state(vectors: list[Tensor], ranks: int) -> dict[str, Any]:
    return {
        "loss_scaler": None,
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": 1.0,
        "base_optimizer_state": _adam_state(vectors),
        "single_partition_of_fp32_groups": vectors,
        "zero_stage": 2,
        "group_paddings": [0] * len(vectors),
        "param_alignment_paddings": None,
        "partition_count": [ranks] * len(vectors),
        "ds_version": "0.19.8",
        "param_slice_mappings": [{} for _ in vectors],
    }


def _stage3_state(vectors: list[Tensor], ranks: int) -> dict[str, Any]:
    return {
        "zero_stage": 3,
        "loss_scaler": None,
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": ranks,
        "optimizer_state_dict": _adam_state(vectors),
        "fp32_flat_groups": vectors,
    }


def _adam_state(vectors: list[Tensor]) -> dict[str, Any]:
    return {
        "state": {
            number: {
                "step": torch.tensor(1.0),
                "exp_avg": vector / 10,
                "exp_avg_sq": vector.square(),
            }
            for number, vector in enumerate(vectors)
        },
        "param_groups": [{"lr": 1e-4, "params": [number]} for number in range(len(vectors))],
    }


def _model_state(groups: Groups, ranks: int, *, is_partitioned: bool) -> dict[str, Any]:
    """The bf16 module, which neither converter reads; at stage 3 its tensors are empty."""
    module = {
        name: torch.zeros(0 if is_partitioned else shape, dtype=torch.bfloat16)
        for group in groups
        for name, shape in group.items()
    }
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [
            {name: torch.Size(shape) for name, shape in group.items()} for group in groups
        ],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": 1,
        "global_samples": 1,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": "0.19.8",
    }
