"""Where a run stands, as its checkpoints keep it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    elapsed_seconds: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)
    validated_step: int = 0
