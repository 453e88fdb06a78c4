"""Loading weights so that every mismatch is named."""

from __future__ import annotations

from torch import Tensor, nn

from lgpt.core.errors import CheckpointError


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """`load_state_dict` that names every missing, unexpected and misshapen key at once.

    Raises:
        CheckpointError: Anything does not fit; the model is left unchanged.
    """
    expected = model.state_dict()
    problems = [f"missing {key}" for key in sorted(expected.keys() - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - expected.keys())]
    problems += [
        f"{key} is {list(state[key].shape)}, the config asks for {list(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (
            f"; and {len(problems) - 8} more" if problems[8:] else ""
        )
        raise CheckpointError(f"{source} does not fit its config: {shown}.")
    model.load_state_dict(state, strict=True)
