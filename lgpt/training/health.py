"""Whether phase 2 is well: numbers of each step in, episodes and what to do about them out.

Pure: no engine, no rank, no log. All ranks see the same numbers, so all decide the same. What the
next decision depends on is `state()`, JSON values, which every checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

import numpy as np
from jaxtyping import Int

Ailment = Literal["codebook_collapse", "discriminator_wins"]
CODEBOOK_COLLAPSE: Ailment = "codebook_collapse"
DISCRIMINATOR_WINS: Ailment = "discriminator_wins"

_OVER_AT = 2.0  # times the bound, so that a loss at the bound does not warn again and again
_SHARE_OF_WINDOW = 10  # a discriminator that rests is asked ten times a window


@dataclass(frozen=True)
class Event:
    """An episode began or ended with this step.

    Attributes:
        value: What was compared with the bound.
    """

    name: Ailment
    is_beginning: bool
    value: float


class UsageWatch:
    """Whether training still uses the codebook.

    A code is in use when one of the last `window_steps` steps took it. Usage is judged at every
    step whose whole window lies behind the warm-up and the last restart. An episode begins when it
    is below the bound, with a restart due, and ends when it is not; while it lasts, a restart is
    due again after every window.

    Args:
        num_codes: K.
        window_steps: Length of the window.
        warmup_steps: Steps at the beginning that are not judged.
        least_usage: The bound, 0 to 1.
    """

    def __init__(
        self, num_codes: int, *, window_steps: int, warmup_steps: int, least_usage: float
    ) -> None:
        self.window_steps, self.least_usage = window_steps, least_usage
        self.is_collapsed = False
        self.is_restart_due = False
        self._judged_from = warmup_steps
        self._last_used = np.full(num_codes, -1, dtype=np.int64)

    def take(self, step: int, counts: Int[np.ndarray, " codes"]) -> None:
        """How often the global batch of this step took each code."""
        self._last_used[counts > 0] = step

    def judge(self, step: int) -> Optional[Event]:
        """After `take` and `restarted` of the same step; tells a change."""
        if step - self._judged_from + 1 < self.window_steps:
            return None
        usage = self.usage(step)
        was_collapsed, self.is_collapsed = self.is_collapsed, usage < self.least_usage
        self.is_restart_due = self.is_collapsed
        if was_collapsed == self.is_collapsed:
            return None
        return Event(CODEBOOK_COLLAPSE, self.is_collapsed, usage)

    def usage(self, step: int) -> float:
        """Share of the codes that the `window_steps` steps up to this one took, 0 to 1."""
        return 1.0 - len(self.unused(step)) / len(self._last_used)

    def unused(self, step: int) -> Int[np.ndarray, " unused"]:
        """The codes that none of the `window_steps` steps up to this one took."""
        return np.flatnonzero(self._last_used <= step - self.window_steps)

    def restarted(self, step: int) -> None:
        """The unused codes stand elsewhere now: what this and older steps took says nothing."""
        self.is_restart_due = False
        self._judged_from = step + 1

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "is_collapsed": self.is_collapsed,
            "is_restart_due": self.is_restart_due,
            "judged_from": self._judged_from,
            "last_used": self._last_used.tolist(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be where `state` was taken."""
        self.is_collapsed = bool(state["is_collapsed"])
        self.is_restart_due = bool(state["is_restart_due"])
        self._judged_from = int(state["judged_from"])
        self._last_used = np.array(state["last_used"], dtype=np.int64)


class DiscriminatorWatch:
    """Whether the discriminator tells real from reconstructed with so little doubt that it teaches
    nothing.

    An episode begins when its hinge loss, as the mean of a whole window, is below the bound. It
    ends when the mean of a tenth of a window, all of it in the episode, is at least twice the
    bound.

    Args:
        window_steps: Length of the window.
        least_loss: The bound; 1 is guessing.
    """

    def __init__(self, *, window_steps: int, least_loss: float) -> None:
        self.window_steps, self.least_loss = window_steps, least_loss
        self.is_winning = False
        self._losses: list[float] = []

    def judge(self, hinge_loss: float) -> Optional[Event]:
        """Takes the loss of a step in which it counts; tells a change."""
        asked = self.window_steps
        if self.is_winning:
            asked = max(1, asked // _SHARE_OF_WINDOW)
        self._losses = [*self._losses, hinge_loss][-asked:]
        if len(self._losses) < asked:
            return None
        mean = sum(self._losses) / asked
        is_over = self.is_winning and mean >= _OVER_AT * self.least_loss
        begins = not self.is_winning and mean < self.least_loss
        if not (is_over or begins):
            return None
        self.is_winning, self._losses = not self.is_winning, []
        return Event(DISCRIMINATOR_WINS, self.is_winning, mean)

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {"is_winning": self.is_winning, "losses": list(self._losses)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be where `state` was taken."""
        self.is_winning = bool(state["is_winning"])
        self._losses = [float(loss) for loss in state["losses"]]
