"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    max_steps: int,
    decay: Literal["cosine", "linear", "constant"],
    final_ratio: float,
    spent_share: float = 0.0,
) -> float:
    """Rate of the update number `step` (0 is the first).

    Args:
        spent_share: Share of the time budget that is used up, 0..1; the decay follows it when it is
            ahead of the steps.

    Warm-up is linear from peak / warmup_steps to peak; then the decay reaches peak x final_ratio at
    the last step. Source of the cosine: Loshchilov & Hutter 2017, eq. 5,
    https://arxiv.org/abs/1608.03983.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if decay == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)
    progress = min(1.0, max(progress, spent_share))
    share = 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final_ratio + (1 - final_ratio) * share)
