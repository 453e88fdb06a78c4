"""Crash-consistent checkpoints around DeepSpeed's own save.

    <run>/checkpoints/step_<n>/     complete, or not there
        <engine>/                   DeepSpeed's files of one engine (its tag), and beside them the
                                    moving average of its weights (average_files.py)
        rng/rank_<r>.pt             generators of every rank (tensors only)
        trainer_state.json          the loop's own state
        config.yaml, ...            the run config and its companions
        manifest.json               size and sha256 of each file; written last
    <run>/checkpoints/latest        `step_<n>` of the newest
    <run>/checkpoints/checks.json   what the last full read of each found (checks.py)
    <run>/checkpoints/.diverged_step_<n>   set aside: its weights gave a loss that was not finite

DeepSpeed alone writes to the final names, does not sync, and points `latest` at a step before all
ranks have written theirs (0.19.8). Here everything is staged, synced, digested and agreed on by all
ranks before one rename makes it a checkpoint.

load.py goes back to one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional, Union

import torch

from lgpt.checkpoint.agreement import on_all_ranks
from lgpt.checkpoint.average_files import average_content, average_file, write_average
from lgpt.checkpoint.background import CopiedStates, Writer
from lgpt.checkpoint.checks import record_check
from lgpt.checkpoint.load import TRAINER_STATE, describe, rng_file
from lgpt.checkpoint.manifest import (
    FileRecord,
    Manifest,
    list_files,
    record_files,
)
from lgpt.checkpoint.retention import Keep, prune, sweep
from lgpt.checkpoint.rng import capture_rng_state
from lgpt.core.distributed import barrier, is_rank_zero, rank, world_size
from lgpt.core.errors import CheckpointError
from lgpt.core.files import (
    sync_folder,
    write_bytes_atomically,
    write_json_atomically,
    write_text_atomically,
)
from lgpt.core.logging import get_logger
from lgpt.engine.average import WeightAverage
from lgpt.engine.ranks import broadcast_from_rank_zero, gather_to_rank_zero

_log = get_logger(__name__)


@dataclass(frozen=True)
class PendingSave:
    """A save that is not a checkpoint yet.

    Attributes:
        manifest: As it will be, without the files.
        writer: Writes in the background; None where the caller waits for every byte.
    """

    staging: Path
    final: Path
    keep: Keep
    manifest: Manifest
    writer: Optional[Writer]

    @property
    def is_written(self) -> bool:
        """Whether this rank's thread has ended, well or not."""
        return self.writer is None or not self.writer.is_alive()


def save_checkpoint(
    engines: Mapping[str, Any],
    run_folder: Path,
    step: int,
    *,
    trainer_state: Mapping[str, Any],
    keep: Keep,
    extra_files: Mapping[str, Union[str, bytes]],
    facts: Optional[Mapping[str, Any]] = None,
    averages: Optional[Mapping[str, WeightAverage]] = None,
) -> Path:
    """Save all engines and every rank's generators. All ranks call it.

    Args:
        engines: DeepSpeed engines by name; the name becomes the folder.
        step: Optimizer steps done; names the checkpoint.
        trainer_state: JSON values, the same on all ranks.
        keep: Which checkpoints stay, this one included.
        extra_files: Files to keep with it, by name.
        facts: JSON values for the manifest (manifest.py); those of rank 0 count.
        averages: Moving averages of weights, by the name of the engine.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: On every rank, when any rank could not write; the older ones are untouched.
    """
    save = _begin(engines, run_folder, step, keep, facts or {}, None)
    with _swept_on_failure(save.staging):
        _stage(engines, save.staging, trainer_state, extra_files, averages or {}, None)
        _complete(save, {})
    return _settle(save)


def begin_save(
    engines: Mapping[str, Any],
    run_folder: Path,
    step: int,
    *,
    trainer_state: Mapping[str, Any],
    keep: Keep,
    extra_files: Mapping[str, Union[str, bytes]],
    facts: Optional[Mapping[str, Any]] = None,
    averages: Optional[Mapping[str, WeightAverage]] = None,
) -> PendingSave:
    """The same, but the engines' states are only copied: a thread writes them from now on.

    The checkpoint is not there before `complete_save`; one save at a time.

    Raises:
        CheckpointError: On every rank, when any rank could not copy or write; nothing is left.
    """
    states = CopiedStates()
    save = _begin(engines, run_folder, step, keep, facts or {}, states)
    with _swept_on_failure(save.staging):
        _stage(engines, save.staging, trainer_state, extra_files, averages or {}, states)
    assert save.writer is not None
    save.writer.start()
    return save


def complete_save(save: PendingSave) -> Path:
    """Wait for this rank's thread, then publish what all have written. All ranks call it.

    Raises:
        CheckpointError: On every rank, when any rank could not write; the older ones are untouched.
    """
    assert save.writer is not None
    save.writer.join()
    with _swept_on_failure(save.staging):
        on_all_ranks(save.writer.raise_what_failed, f"write {save.staging}")
        _complete(save, save.writer.records)
    return _settle(save)


def abandon_save(save: PendingSave) -> None:
    """Wait for the threads, and leave nothing of it. All ranks call it."""
    assert save.writer is not None
    save.writer.join()
    barrier()
    if is_rank_zero():
        shutil.rmtree(save.staging, ignore_errors=True)


def _begin(
    engines: Mapping[str, Any],
    run_folder: Path,
    step: int,
    keep: Keep,
    facts: Mapping[str, Any],
    states: Optional[CopiedStates],
) -> PendingSave:
    checkpoints = run_folder / "checkpoints"
    staging, final = checkpoints / f".staging_step_{step}", checkpoints / f"step_{step}"
    manifest = Manifest(step, world_size(), describe(engines), {}, _versions(), dict(facts))
    writer = None if states is None else Writer(staging, states)
    return PendingSave(staging, final, keep, manifest, writer)


@contextmanager
def _swept_on_failure(staging: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        # torch's writer says "unexpected pos" where a disk is full.
        told = f"{error}{_free_space(staging.parent)}"
        barrier()  # all have looked
        if is_rank_zero():
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(told) from error


def _settle(save: PendingSave) -> Path:
    if is_rank_zero():
        record_check(save.final, [])  # every file was just read back from where it was synced to
        prune(save.final.parent, save.keep)
        _log.info("Checkpoint %s saved", save.final)
    barrier()
    return save.final


def _free_space(folder: Path) -> str:
    try:
        return f" (free on its disk: {shutil.disk_usage(folder).free:,} bytes)"
    except OSError:
        return ""


def _stage(
    engines: Mapping[str, Any],
    staging: Path,
    trainer_state: Mapping[str, Any],
    extra_files: Mapping[str, Union[str, bytes]],
    averages: Mapping[str, WeightAverage],
    states: Optional[CopiedStates],
) -> None:
    """Write everything but the manifest into the staging folder.

    Args:
        states: Takes what the engines would write, where it is given.
    """

    def prepare() -> None:
        if is_rank_zero():
            sweep(staging.parent)  # what resists is told after the save, by prune
            if staging.exists():
                shutil.rmtree(staging)
            (staging / "rng").mkdir(parents=True)
            write_json_atomically(staging / TRAINER_STATE, dict(trainer_state))
            for name, content in extra_files.items():
                payload = content.encode() if isinstance(content, str) else content
                write_bytes_atomically(staging / name, payload)

    on_all_ranks(prepare, f"prepare {staging}")
    on_all_ranks(
        lambda: torch.save(capture_rng_state(), rng_file(staging, rank())), f"write {staging}"
    )
    for name, engine in engines.items():
        save = partial(_save_engine, engine, staging, name, states)
        on_all_ranks(save, f"write {staging}")
    for name, average in averages.items():
        write = partial(_save_average, average, staging / name, states)
        on_all_ranks(write, f"write {staging}")


def _complete(save: PendingSave, written: Mapping[str, FileRecord]) -> None:
    """Sync and digest what was staged, every rank its share; write the manifest and publish.

    Args:
        written: What this rank has synced and digested already.
    """
    staging = save.staging
    names: list[str] = []
    records = dict(written)

    def list_names() -> None:
        if is_rank_zero():
            done = {name for part in before for name in part}
            names.extend(name for name in list_files(staging) if name not in done)

    def record() -> None:
        records.update(record_files(staging, my_names))

    def publish() -> None:
        if is_rank_zero():
            files = {name: each for part in parts for name, each in part.items()}
            replace(save.manifest, files=files).write(staging)
            _publish(staging, save.final)

    before = gather_to_rank_zero(list(written))
    on_all_ranks(list_names, f"list {staging}")
    my_names = broadcast_from_rank_zero(names)[rank() :: world_size()]
    on_all_ranks(record, f"read back {staging}")
    parts = gather_to_rank_zero(records)
    on_all_ranks(publish, f"complete {save.final}")


def _save_engine(engine: Any, staging: Path, name: str, states: Optional[CopiedStates]) -> None:
    """DeepSpeed's save; a rank that could not write still meets the others in its collectives."""
    try:
        with nullcontext() if states is None else states.instead_of_files(engine):
            engine.save_checkpoint(str(staging), tag=name, save_latest=False)
    except (OSError, RuntimeError):
        # Between its writes and its end DeepSpeed (0.19.8) has the stage 3 re-gathering and a
        # barrier, in which the ranks that could write are waiting.
        if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
            engine.optimizer.checkpoint_event_epilogue()
        barrier()
        raise
    if is_rank_zero():
        for script in staging.glob("zero_to_*.py"):
            script.unlink()  # DeepSpeed's converter, in every checkpoint; ours is `lgpt convert`


def _save_average(
    average: WeightAverage, engine_folder: Path, states: Optional[CopiedStates]
) -> None:
    if states is None:
        write_average(average.state(), engine_folder, rank())
    else:
        states.add(average_file(engine_folder, rank()), average_content(average.state()))


def _publish(staging: Path, final: Path) -> None:
    """Turn the staged folder into a checkpoint: one rename, then `latest`."""
    for folder in {path.parent for path in staging.rglob("*")}:
        sync_folder(folder)
    if final.exists():
        # The same step once more, or a damaged one that is being replaced.
        final.rename(final.with_name(f".replaced_{final.name}"))
    staging.rename(final)
    sync_folder(final.parent)
    write_text_atomically(final.parent / "latest", f"{final.name}\n")


def _versions() -> dict[str, str]:
    from lgpt import __version__

    return {
        "lgpt": __version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }
