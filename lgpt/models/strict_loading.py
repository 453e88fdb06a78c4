"""Loading weights so that every mismatch is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lgpt.core.errors import CheckpointError

Shape = tuple[int, ...]
_PROBLEMS_SHOWN = 8


class Layout:
    """How a foreign file names and lays out the tensors of our model; here: as we do."""

    def name(self, key: str) -> str:
        """What the file calls our tensor `key`."""
        return key

    def shapes(self, key: str, shape: Shape) -> tuple[Shape, ...]:
        """The shapes it may have in the file, the usual one first."""
        return (shape,)

    def axes(self, key: str, shape: Shape) -> tuple[int, ...]:
        """The file's axes in our order; `shape` is ours."""
        return tuple(range(len(shape)))


class Matched(NamedTuple):
    """Our state dict in float32, and what had to be done to the file's tensors."""

    state: dict[str, Tensor]
    renamed: int
    transposed: int
    reshaped: int


OURS = Layout()


def match_strictly(
    expected: Mapping[str, Shape],
    found: Mapping[str, Tensor],
    source: str,
    layout: Layout = OURS,
) -> Matched:
    """Bring a file's tensors into our names and axes, one to one.

    Values are only looked at when every name and shape fits.

    Args:
        expected: Our keys and shapes.
        found: The file's tensors under the file's own names.
        source: The file, for messages.

    Raises:
        CheckpointError: Tensors are missing, unexpected, misshapen or not finite; each is named as
            the file names it.
    """
    keys = {layout.name(key): key for key in expected}
    assert len(keys) == len(expected), "two of our tensors share a name in the file"
    problems = [f"missing {_both(name, keys)}" for name in sorted(keys.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - keys.keys())]
    for name in sorted(keys.keys() & found.keys()):
        allowed = layout.shapes(keys[name], expected[keys[name]])
        if not found[name].is_floating_point() or found[name].layout != torch.strided:
            problems.append(f"{_both(name, keys)} holds no floating-point numbers")
        if tuple(found[name].shape) not in allowed:
            problems.append(
                f"{_both(name, keys)} is {list(found[name].shape)}, the config asks for "
                f"{list(allowed[0])}"
            )
    _refuse(problems, f"{source} does not fit its config")
    state, transposed, reshaped = {}, 0, 0
    for name, key in keys.items():
        shape, axes = expected[key], layout.axes(key, expected[key])
        usual = layout.shapes(key, shape)[0]
        state[key] = found[name].float().reshape(usual).permute(axes).contiguous()
        transposed += axes != tuple(range(len(axes)))
        reshaped += tuple(found[name].shape) != usual
    refuse_not_finite({layout.name(key): tensor for key, tensor in state.items()}, source)
    return Matched(state, sum(name != key for name, key in keys.items()), transposed, reshaped)


def refuse_not_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights with NaN or infinities.

    Raises:
        CheckpointError: Names the tensors.
    """
    bad = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    _refuse(bad, f"{source} holds numbers that are not finite, in")


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """`load_state_dict` that names every missing, unexpected and misshapen key at once.

    Raises:
        CheckpointError: Anything does not fit; the model is left unchanged.
    """
    check_strictly(model.state_dict(), state, source)
    model.load_state_dict(state, strict=True)


def check_strictly(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str
) -> None:
    """Refuse a state dict whose keys or shapes differ; values of `expected` are not looked at.

    Raises:
        CheckpointError: Names what is missing, unexpected or misshapen.
    """
    problems = [f"missing {key}" for key in sorted(expected.keys() - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - expected.keys())]
    problems += [
        f"{key} is {list(state[key].shape)}, the config asks for {list(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    _refuse(problems, f"{source} does not fit its config")


def _both(name: str, keys: Mapping[str, str]) -> str:
    return name if keys[name] == name else f"{name} (here {keys[name]})"


def _refuse(problems: list[str], what: str) -> None:
    if not problems:
        return
    more = len(problems) - _PROBLEMS_SHOWN
    shown = "; ".join(problems[:_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    raise CheckpointError(f"{what}: {shown}.")
