"""What a checkpoint's manifest tells beside its files: the place of the run, and what it reads."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Optional

from lgpt import __version__
from lgpt.checkpoint.logits_check import FILE_NAME as LOGITS_FILE
from lgpt.checkpoint.logits_check import LOGITS_OF_AVERAGE_FILE, pack_logits
from lgpt.checkpoint.model_card import source_commit
from lgpt.core.distributed import is_rank_zero
from lgpt.engine.average import WeightAverage
from lgpt.engine.build import hyperparameters
from lgpt.settings.phases import RunSettings
from lgpt.training.task import TrainingTask


def checkpoint_facts(run: RunSettings, task: TrainingTask, step: int) -> dict[str, Any]:
    """JSON values for `Manifest.facts`.

    Args:
        step: Optimizer steps done; the next one begins at `place.next_image` of the sample order.
    """
    images, batch = task.training_images, run.batch
    next_image = step * batch.global_batch_images
    return {
        "place": {
            "next_image": next_image,
            "epoch": next_image // images,
            "next_image_of_epoch": next_image % images,
            "images_per_epoch": images,
            "seed": run.seed,
        },
        "batch": batch.model_dump(),
        "hyperparameters": {
            name: hyperparameters(engine) for name, engine in task.engines().items()
        },
        "content": task.content(),
        "code": code_version(),
    }


def checkpoint_logits(task: TrainingTask, average: Optional[WeightAverage]) -> dict[str, bytes]:
    """Files that a conversion can be checked by, the average's too; empty on ranks but the first.

    All ranks call it.
    """
    probes = {LOGITS_FILE: task.probe()}
    if probes[LOGITS_FILE] and average is not None:
        with average.in_use():
            probes[LOGITS_OF_AVERAGE_FILE] = task.probe()
    if not is_rank_zero():
        return {}
    return {name: pack_logits(probe) for name, probe in probes.items() if probe}


def code_version() -> dict[str, Optional[str]]:
    """The version of lgpt, and the git commit where it runs from a checkout."""
    return {"lgpt": __version__, "commit": _commit_at_start()}


@lru_cache(maxsize=1)
def _commit_at_start() -> Optional[str]:
    # Once: what is checked out later is not what runs.
    return source_commit()
