"""What one rank could not do, all ranks learn: none is left waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable

from lgpt.core.errors import CheckpointError
from lgpt.engine.ranks import broadcast_from_rank_zero, gather_to_rank_zero


def on_all_ranks(action: Callable[[], None], what: str) -> None:
    """Run an action on every rank; when it fails on any, raise on all.

    Args:
        what: Goes on after "could not", in the error's first words.

    Raises:
        CheckpointError: On every rank, with what went wrong on which.
    """
    problems: list[str] = []
    try:
        action()
    except CheckpointError as error:
        problems = [str(error)]
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        problems = [f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"]
    gathered = gather_to_rank_zero(problems)
    told = [f"rank {number}: {problem}" for number, mine in enumerate(gathered) for problem in mine]
    told = broadcast_from_rank_zero(told)
    if told:
        raise CheckpointError(f"could not {what}: {'; '.join(told)}")
