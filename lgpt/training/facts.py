"""What a checkpoint's manifest tells beside its files: the place of the run, and what it reads."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Optional

from lgpt import __version__
from lgpt.checkpoint.model_card import source_commit
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


def code_version() -> dict[str, Optional[str]]:
    """The version of lgpt, and the git commit where it runs from a checkout."""
    return {"lgpt": __version__, "commit": _commit_at_start()}


@lru_cache(maxsize=1)
def _commit_at_start() -> Optional[str]:
    # Once: what is checked out later is not what runs.
    return source_commit()
