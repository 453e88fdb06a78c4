"""`lgpt checkpoint ...`: look at, verify and remove the checkpoints of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Optional

import typer

from lgpt.cli_parts import JSON, print_table
from lgpt.core.errors import CheckpointError, SettingsError

checkpoint_app = typer.Typer(
    help="""Look at the checkpoints of a run, verify them, remove old ones.

    A checkpoint is runs/NAME/checkpoints/step_N. It is written beside its place, synced, listed in
    a manifest with every file's size and sha256, and only then renamed: it is whole or not there.
    """,
    no_args_is_help=True,
)

_RUN = typer.Argument(..., help="a run folder, runs/NAME")


@checkpoint_app.command("ls")
def ls_command(run: Path = _RUN, as_json: bool = JSON) -> None:
    """List checkpoints: when saved, by how many ranks, size, validation loss, state, why they stay.

    "sizes right" says that no file is missing or short; "whole, read ..." that every byte was
    compared with its digest at that time. Files are not read here: `lgpt checkpoint verify` does.
    """
    from lgpt.checkpoint.inspection import checkpoints_table, list_checkpoints

    listed = list_checkpoints(run, _keep_of(run))
    print_table(checkpoints_table(listed), listed, as_json)


@checkpoint_app.command("verify")
def verify_command(
    place: Path = typer.Argument(..., help="a run folder (all of its checkpoints), or one step_N"),
    as_json: bool = JSON,
) -> None:
    """Read every byte and compare it with the sha256 taken at the save; exit 3 when one differs.

    What is found is remembered (checkpoints/checks.json): a start skips a damaged checkpoint, and
    the newest one that was found whole is never removed.
    """
    from lgpt.checkpoint.inspection import verified_table, verify_checkpoints

    verified = verify_checkpoints(place)
    print_table(verified_table(verified), verified, as_json)
    damaged = [each for each in verified["checkpoints"] if not each["is_whole"]]
    if damaged:
        sys.stdout.flush()
        raise CheckpointError(
            f"{len(damaged)} of {len(verified['checkpoints'])} checkpoints are damaged; `lgpt "
            "checkpoint why RUN` says which one a start goes on from."
        )


@checkpoint_app.command("why")
def why_command(
    run: Path = _RUN,
    quick: bool = typer.Option(
        False, "--quick", help="look at sizes only, instead of reading what a start would read"
    ),
    as_json: bool = JSON,
) -> None:
    """Say which checkpoint a start would go on from, and why not from each newer one."""
    from lgpt.checkpoint.inspection import choice_text, explain_choice

    choice = explain_choice(run, reads_all=not quick)
    _tell(choice_text(choice), choice, as_json)


@checkpoint_app.command("prune")
def prune_command(
    run: Path = _RUN,
    keep_last: Optional[int] = typer.Option(
        None, min=2, help="newest ones that stay; default: the run's checkpoint.keep_last"
    ),
    keep_every: Optional[int] = typer.Option(
        None, min=0, help="and every step that this divides; default: the run's keep_every"
    ),
    keep_best: Optional[int] = typer.Option(
        None, min=0, help="and the best by validation loss; default: the run's keep_best"
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="only say what would go"),
    as_json: bool = JSON,
) -> None:
    """Remove old checkpoints, as every save does, and say why the others stay.

    Never under two whole ones, never the newest that was verified. Not while the run is training.
    """
    from lgpt.checkpoint.inspection import prune_run, prune_text
    from lgpt.checkpoint.retention import Keep

    own = _keep_of(run)
    keep = Keep(
        own.last if keep_last is None else keep_last,
        own.every_steps if keep_every is None else keep_every,
        own.best if keep_best is None else keep_best,
    )
    pruned = prune_run(run, keep, dry_run)
    _tell(prune_text(pruned), pruned, as_json)


def _keep_of(run_folder: Path) -> Any:
    """What the run's own config keeps."""
    from lgpt.checkpoint.retention import Keep
    from lgpt.settings.run import load_run_settings

    if not (run_folder / "config.yaml").is_file():
        raise SettingsError(
            f"{run_folder} holds no config.yaml: give the folder of a run, runs/NAME."
        )
    run = load_run_settings(run_folder / "config.yaml", environ={}, check_deepspeed=False)
    return Keep(run.checkpoint.keep_last, run.checkpoint.keep_every, run.checkpoint.keep_best)


def _tell(text: str, result: dict[str, Any], as_json: bool) -> None:
    print(text)
    if as_json:
        print(json.dumps(result))
