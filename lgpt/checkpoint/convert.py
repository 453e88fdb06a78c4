"""ZeRO shards to whole weights, without DeepSpeed and without unpickling code."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lgpt.checkpoint.weight_source import whole_tensors
from lgpt.checkpoint.zero_shards import ZeroShards


def merged_weights(step_folder: Path, engine_name: str = "model") -> dict[str, Tensor]:
    """The whole state dict of one engine of a checkpoint, in memory.

    Args:
        step_folder: `checkpoints/step_<n>`.
        engine_name: Folder of the engine in it.

    Returns:
        Every parameter and buffer by its name, in the module's order: floating point as float32,
        integers as they are. Shared parameters are one tensor under several names.

    Raises:
        CheckpointError: A file is missing, unreadable or holds code, or names and sizes do not add
            up.
    """
    return whole_tensors(ZeroShards(step_folder / engine_name))
