"""The moving average of the weights in a checkpoint: one file a rank, cut as the rank's masters.

    <step>/<engine>/weight_average_rank_<r, five digits>.pt    by torch.save, tensors and numbers:
        format     1
        decay      training.ema_decay at the save
        updates    steps that the average has followed
        vectors    list of flat float32 tensors

`vectors` has the layout of the masters in the same rank's `*zero_pp_rank_<r>_*_optim_states.pt`
(`single_partition_of_fp32_groups` at ZeRO-1 and 2, `fp32_flat_groups` at ZeRO-3): as many tensors,
of the same lengths, the same elements in the same places, padding included or left out as there.
Whoever merges or cuts masters does the same with these (zero_shards.py: `ZeroShards`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import torch

from lgpt.checkpoint.deepspeed_files import read_safely
from lgpt.core.errors import CheckpointError
from lgpt.engine.average import AverageState

_FORMAT = 1
_KEYS = {"format", "decay", "updates", "vectors"}


def average_file(engine_folder: Path, rank: int) -> Path:
    """Where the average of one rank is kept."""
    return engine_folder / f"weight_average_rank_{rank:05d}.pt"


def has_average(engine_folder: Path) -> bool:
    """Whether a checkpoint's engine was saved with an average."""
    return average_file(engine_folder, 0).is_file()


def takes_average(engine_folder: Path, wanted: Optional[bool] = None) -> bool:
    """Whether what is made of a checkpoint is made of the average.

    Args:
        wanted: None: wherever there is one.

    Raises:
        CheckpointError: It is wanted, and there is none.
    """
    is_there = has_average(engine_folder)
    if wanted and not is_there:
        raise CheckpointError(
            f"{engine_folder} holds no moving average of the weights (it was saved with "
            "training.ema_decay: 0): leave out --ema to take the weights of the last step."
        )
    return is_there if wanted is None else wanted


def average_content(state: AverageState) -> dict[str, object]:
    """What the file of one rank holds."""
    return {
        "format": _FORMAT,
        "decay": state.decay,
        "updates": state.updates,
        "vectors": [vector.detach() for vector in state.vectors],
    }


def write_average(state: AverageState, engine_folder: Path, rank: int) -> None:
    """Write one rank's average; the manifest lists it as any other file."""
    on_cpu = state._replace(vectors=[vector.cpu() for vector in state.vectors])
    torch.save(average_content(on_cpu), average_file(engine_folder, rank))


def read_average(engine_folder: Path, rank: int) -> AverageState:
    """One rank's average; its vectors are mapped from the file.

    Raises:
        CheckpointError: It is missing, damaged, of a newer format, or holds code.
    """
    path = average_file(engine_folder, rank)
    content = read_safely(path)
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise CheckpointError(f"{path} holds no average: {sorted(_KEYS)} are expected in it.")
    if content["format"] != _FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this version reads {_FORMAT}: use the version "
            "of lgpt that wrote it."
        )
    return AverageState(content["vectors"], int(content["updates"]), float(content["decay"]))
