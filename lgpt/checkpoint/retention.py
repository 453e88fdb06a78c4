"""Which checkpoints stay, and how the others go without ever leaving half a one."""

from __future__ import annotations

import shutil
from pathlib import Path

from lgpt.checkpoint.folders import step_folders, step_of, verify
from lgpt.core.logging import get_logger

_log = get_logger(__name__)


def prune(checkpoints: Path, keep_last: int) -> None:
    """Keep the newest `keep_last` whole ones; what is damaged and older than those goes too."""
    whole = [folder for folder in step_folders(checkpoints) if not verify(folder, deep=False)]
    if len(whole) <= keep_last:
        old = []
    else:
        old = [
            folder
            for folder in step_folders(checkpoints)
            if step_of(folder) < step_of(whole[keep_last - 1])
        ]
    problems = []
    for folder in old:
        # Renamed first: a kill in the middle must not leave half a checkpoint under its name.
        try:
            folder.rename(folder.with_name(f".pruned_{folder.name}"))
        except OSError as error:
            problems.append(str(error))
    problems += sweep(checkpoints)
    if problems:
        _log.warning("Old checkpoints could not be removed: %s", "; ".join(problems))


def sweep(checkpoints: Path) -> list[str]:
    """Remove what an interrupted save or removal left; returns what could not be removed.

    A file that a reader holds open makes a folder on NFS resist, and the next save must not fail
    for it.
    """
    problems = []
    for kind in ("staging", "pruned", "replaced"):
        for folder in checkpoints.glob(f".{kind}_step_*"):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                problems.append(str(error))
    return problems
