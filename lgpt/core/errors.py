"""What a user can mend, as exceptions.

    LgptError                 exit code
    ├── SettingsError         2   a run config, a DeepSpeed config or a command line is wrong
    ├── DataError             3   pictures, captions or a latent cache are unusable
    ├── CheckpointError       3   a checkpoint, model folder or foreign weight file is unusable
    ├── DivergedError         4   the loss is no longer finite
    ├── OutOfMemoryError      4   a batch does not fit on the device
    ├── RankLostError         4   another rank was killed, often for its memory
    └── StoppedEarly          75  stopped by a signal, a checkpoint is saved: run it again

The command line prints the message without a traceback and exits with the code. Anything else that
is raised is our own mistake and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union


class LgptError(Exception):
    """A problem that the user can mend: one clear text with the values and the way out."""

    exit_code = 2


class SettingsError(LgptError):
    """One or more mistakes in settings; all are reported together.

    Args:
        problems: One text a mistake, each with its place, value and way out.
        heading: What was being read when they were found.
    """

    exit_code = 2

    def __init__(self, problems: Union[str, Sequence[str]], heading: str = "") -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        lines = list(self.problems)
        if len(lines) > 1 or heading:
            count = f"{len(lines)} problem" + ("s" if len(lines) != 1 else "")
            title = f"{heading}: {count}" if heading else count
            lines = [title, *(f"  {n}. {text}" for n, text in enumerate(self.problems, 1))]
        super().__init__("\n".join(lines))


class DataError(LgptError):
    """Pictures, captions or a latent cache that cannot be used."""

    exit_code = 3


class CheckpointError(LgptError):
    """A checkpoint, model folder or weight file that cannot be used."""

    exit_code = 3


class DivergedError(LgptError):
    """Training produced a loss or gradient that is not finite."""

    exit_code = 4


class OutOfMemoryError(LgptError):
    """The batch does not fit on the device."""

    exit_code = 4


class RankLostError(LgptError):
    """Another rank is gone, and this one cannot go on without it."""

    exit_code = 4


class StoppedEarly(LgptError):  # noqa: N818 - a stop that was asked for is no error
    """Stopped by a signal after saving a checkpoint; the same command goes on from there."""

    exit_code = 75
