"""ZeRO shards to whole weights in memory, without DeepSpeed and without unpickling code."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lgpt.checkpoint.weight_source import whole_tensors
from lgpt.checkpoint.zero_shards import ZeroShards


def merged_weights(engine_folder: Path, *, of_average: bool = False) -> dict[str, Tensor]:
    """The whole state dict of one engine of a checkpoint, in memory.

    Args:
        engine_folder: DeepSpeed's tag, such as `checkpoints/step_<n>/model`.
        of_average: The moving average of the weights, which must be there.

    Returns:
        Every parameter and buffer by its name, in the module's order: floating point as float32,
        integers as they are. Shared parameters are one tensor under several names.

    Raises:
        CheckpointError: A file is missing, unreadable or holds code, or names and sizes do not add
            up.
    """
    return whole_tensors(ZeroShards(engine_folder, of_average=of_average))
