"""Logits that training keeps with a checkpoint, and the same ones from what was made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.engine.start import afford_bf16
from lgpt.models.latent_gpt import LatentGPT

FILE_NAME = "logits.safetensors"
LOGITS_OF_AVERAGE_FILE = "logits_of_average.safetensors"
# Of the largest logit: bf16 on another device differs by a percent or two, a lost matrix by all.
_ALLOWED_SHARE = 0.05


@dataclass(frozen=True)
class LogitsCheck:
    """How far the logits of a model folder are from those of the training.

    Attributes:
        largest_difference: Over all logits, absolute.
        largest_logit: Absolute, of the stored ones.
        precision: In which both were computed: fp32 or bf16.
        count: Logits that were compared.
    """

    largest_difference: float
    largest_logit: float
    precision: str
    count: int


def pack_logits(tensors: Mapping[str, Tensor]) -> bytes:
    """What a task's `probe` gave, as the content of the file in a checkpoint."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def check_logits(
    model_folder: Path, step_folder: Path, precision: str, *, of_average: bool
) -> LogitsCheck:
    """Run a model folder on the inputs that were kept with a checkpoint. Loads the whole model.

    Args:
        model_folder: With config and weights of a LatentGPT.
        step_folder: The checkpoint that it was made of.
        precision: fp32 or bf16, in which the training computed.
        of_average: The model folder holds the moving average of the weights.

    Raises:
        CheckpointError: The checkpoint holds no logits, or the difference is not one of rounding.
    """
    path = step_folder / (LOGITS_OF_AVERAGE_FILE if of_average else FILE_NAME)
    if not path.is_file():
        raise CheckpointError(
            f"{step_folder} holds no {path.name}: training keeps logits with the checkpoints of "
            "transformers, since this version; convert it without --verify."
        )
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    model = LatentGPT.from_pretrained(model_folder)
    if precision == "bf16":
        afford_bf16(torch.device("cpu"))
        model = model.bfloat16()
    with torch.no_grad():
        logits = model(
            stored["tokens"],
            stored.get("text"),
            stored.get("text_mask"),
            null_text=stored["null_text"],
            positions=stored["positions"],
        )
    difference = (logits.float() - stored["logits"]).abs().max()
    check = LogitsCheck(
        float(difference), float(stored["logits"].abs().max()), precision, stored["logits"].numel()
    )
    if not check.largest_difference <= _ALLOWED_SHARE * check.largest_logit:
        raise CheckpointError(
            f"The logits of the converted model differ by up to {check.largest_difference:.3g} "
            f"from those that training kept with {step_folder} (up to {check.largest_logit:.3g}): "
            "rounding does not explain that, so nothing was written."
        )
    return check
