"""Where a run stands, as its checkpoints keep it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        task: What the phase's task keeps besides, as `TrainingTask.state` gave it at the save.
    """

    step: int = 0
    elapsed_seconds: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)
    validated_step: int = 0
    best_validation_loss: Optional[float] = None
    best_validation_step: int = 0
    validations_without_gain: int = 0
    task: dict[str, Any] = field(default_factory=dict)

    def note_validation(self, loss: float) -> None:
        """Of the current step; a loss that is not finite is no gain."""
        is_first = self.best_validation_loss is None and math.isfinite(loss)
        if is_first or (self.best_validation_loss is not None and loss < self.best_validation_loss):
            self.best_validation_loss, self.best_validation_step = loss, self.step
            self.validations_without_gain = 0
        else:
            self.validations_without_gain += 1
