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

DeepSpeed unpickles its own files, code and all, when it loads them: resume only from run
folders that you trust. Conversion (convert.py) does not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional, Union

import torch

from lgpt.checkpoint.agreement import on_all_ranks
from lgpt.checkpoint.average_files import average_file, read_average, write_average
from lgpt.checkpoint.checks import record_check
from lgpt.checkpoint.elastic import load_engine_elastically
from lgpt.checkpoint.folders import problems_known_of, step_folders
from lgpt.checkpoint.manifest import (
    EngineRecord,
    FileRecord,
    Manifest,
    list_files,
    problems_of_files,
    read_manifest,
    record_files,
)
from lgpt.checkpoint.retention import Keep, prune, put_back_replaced, sweep
from lgpt.checkpoint.rng import branch_rng_state, capture_rng_state, restore_rng_state
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

_TRAINER_STATE = "trainer_state.json"

_log = get_logger(__name__)


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
    checkpoints = run_folder / "checkpoints"
    staging, final = checkpoints / f".staging_step_{step}", checkpoints / f"step_{step}"
    try:
        _stage(engines, staging, trainer_state, extra_files, averages or {})
        _complete(engines, staging, final, step, facts or {})
    except CheckpointError as error:
        # torch's writer says "unexpected pos" where a disk is full.
        told = f"{error}{_free_space(checkpoints)}"
        barrier()  # all have looked
        if is_rank_zero():
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(told) from error
    if is_rank_zero():
        record_check(final, [])  # every file was just read back from where it was synced to
        prune(checkpoints, keep)
        _log.info("Checkpoint %s saved", final)
    barrier()
    return final


def _free_space(folder: Path) -> str:
    try:
        return f" (free on its disk: {shutil.disk_usage(folder).free:,} bytes)"
    except OSError:
        return ""


def find_whole_checkpoint(run_folder: Path) -> Optional[Path]:
    """The newest checkpoint of which every byte is as it was saved. All ranks call it.

    Each rank reads its share. One that is damaged is told with its reason and skipped.
    """
    candidates: list[Path] = []
    if is_rank_zero():
        put_back_replaced(run_folder / "checkpoints")
        candidates = step_folders(run_folder / "checkpoints")
    candidates = broadcast_from_rank_zero(candidates)
    for folder in candidates:
        problems = broadcast_from_rank_zero(problems_known_of(folder) if is_rank_zero() else [])
        if not problems:
            problems = _problems_over_ranks(folder)
            if is_rank_zero():
                record_check(folder, problems)
        if not problems:
            return Path(folder)
        if is_rank_zero():
            _log.warning("Checkpoint %s is skipped: %s", folder, "; ".join(problems[:3]))
    return None


def _problems_over_ranks(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's content, every rank reading its share of the files."""
    try:
        files = read_manifest(folder).files
        names = sorted(files)[rank() :: world_size()]
        mine = problems_of_files(folder, {name: files[name] for name in names}, deep=True)
    except CheckpointError as error:  # a network file system may show ranks different things
        mine = [f"rank {rank()}: {error}"]
    gathered = gather_to_rank_zero(mine)
    found: list[str] = broadcast_from_rank_zero([each for part in gathered for each in part])
    return found


def load_checkpoint(
    engines: Mapping[str, Any],
    folder: Path,
    averages: Optional[Mapping[str, WeightAverage]] = None,
) -> dict[str, Any]:
    """Put engines and this rank's generators where they were at the save. All ranks call it.

    Saved by as many ranks at the same ZeRO stage, the next step is the one that would have come,
    bit for bit. Otherwise elastic.py cuts the state anew, and rng.py starts new generators when
    there are more or fewer ranks.

    Args:
        folder: As `find_whole_checkpoint` gave it: its content was compared with its digests.
        averages: Moving averages by the name of the engine; where the checkpoint has none, they
            start from its weights, which is told.

    Returns:
        The `trainer_state` of the save.

    Raises:
        CheckpointError: On every rank: it was saved by other engines or in another precision.
    """
    folder = broadcast_from_rank_zero(folder)
    found: list[Manifest] = []
    on_all_ranks(lambda: found.append(read_manifest(folder)), f"load {folder}")
    manifest = found[0]
    _refuse_other_engines(engines, manifest, folder)
    is_same_world = manifest.world_size == world_size()
    for name, engine in engines.items():
        average = (averages or {}).get(name)
        # As the manifest says: a network file system may show ranks different things.
        has_average = average_file(Path(name), 0).as_posix() in manifest.files
        if is_same_world and manifest.engines[name] == _describe_engine(engine):
            _load_engine(engine, folder, name)
            if average is not None and has_average:
                _load_average(average, folder / name)
        else:
            load_engine_elastically(engine, folder / name, average if has_average else None)
        if has_average != (average is not None):
            _begin_or_end_average(average, folder / name, manifest.step)
    if is_same_world:
        restore_rng_state(torch.load(_rng_file(folder, rank()), weights_only=True))
    else:
        branch_rng_state(torch.load(_rng_file(folder, 0), weights_only=True))
    state: dict[str, Any] = json.loads((folder / _TRAINER_STATE).read_text())
    return state


def _stage(
    engines: Mapping[str, Any],
    staging: Path,
    trainer_state: Mapping[str, Any],
    extra_files: Mapping[str, Union[str, bytes]],
    averages: Mapping[str, WeightAverage],
) -> None:
    """Write everything but the manifest into the staging folder."""

    def prepare() -> None:
        if is_rank_zero():
            sweep(staging.parent)  # what resists is told after the save, by prune
            if staging.exists():
                shutil.rmtree(staging)
            (staging / "rng").mkdir(parents=True)
            write_json_atomically(staging / _TRAINER_STATE, dict(trainer_state))
            for name, content in extra_files.items():
                payload = content.encode() if isinstance(content, str) else content
                write_bytes_atomically(staging / name, payload)

    on_all_ranks(prepare, f"prepare {staging}")
    on_all_ranks(
        lambda: torch.save(capture_rng_state(), _rng_file(staging, rank())), f"write {staging}"
    )
    for name, engine in engines.items():
        save = partial(_save_engine, engine, staging, name)
        on_all_ranks(save, f"write {staging}")
    for name, average in averages.items():
        write = partial(write_average, average.state(), staging / name, rank())
        on_all_ranks(write, f"write {staging}")


def _complete(
    engines: Mapping[str, Any], staging: Path, final: Path, step: int, facts: Mapping[str, Any]
) -> None:
    """Sync and digest what was staged, every rank its share; write the manifest and publish."""
    names: list[str] = []
    records: dict[str, FileRecord] = {}

    def list_names() -> None:
        if is_rank_zero():
            names.extend(list_files(staging))

    def record() -> None:
        records.update(record_files(staging, my_names))

    def publish() -> None:
        if is_rank_zero():
            files = {name: each for part in parts for name, each in part.items()}
            manifest = Manifest(
                step, world_size(), _describe(engines), files, _versions(), dict(facts)
            )
            manifest.write(staging)
            _publish(staging, final)

    on_all_ranks(list_names, f"list {staging}")
    my_names = broadcast_from_rank_zero(names)[rank() :: world_size()]
    on_all_ranks(record, f"read back {staging}")
    parts = gather_to_rank_zero(records)
    on_all_ranks(publish, f"complete {final}")


def _save_engine(engine: Any, staging: Path, name: str) -> None:
    """DeepSpeed's save; a rank that could not write still meets the others in its collectives."""
    try:
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


def _load_engine(engine: Any, folder: Path, name: str) -> None:
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=name)
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but it says nothing about the checkpoint
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"{folder / name} does not fit the model or optimizer of this run config: "
            f"{str(error)[:500]}. Train with the config.yaml that lies in that folder, or start a "
            "new run under another name=."
        ) from error
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder / name}.")


def _load_average(average: WeightAverage, engine_folder: Path) -> None:
    saved = read_average(engine_folder, rank())
    try:
        average.load(saved.vectors, saved.updates)
    except ValueError as error:
        raise CheckpointError(f"{average_file(engine_folder, rank())}: {error}.") from error


def _begin_or_end_average(average: Optional[WeightAverage], engine_folder: Path, step: int) -> None:
    """Of the two, checkpoint and run, only one has an average."""
    if average is not None:
        average.restart()
    if not is_rank_zero():
        return
    if average is None:
        _log.warning(
            "%s holds a moving average of the weights, and this run keeps none "
            "(training.ema_decay: 0): it ends here.",
            engine_folder,
        )
    else:
        _log.warning(
            "%s was saved without a moving average of the weights (training.ema_decay): it "
            "starts from the weights of step %d.",
            engine_folder,
            step,
        )


def _describe(engines: Mapping[str, Any]) -> dict[str, EngineRecord]:
    return {name: _describe_engine(engine) for name, engine in engines.items()}


def _describe_engine(engine: Any) -> EngineRecord:
    precision = "bf16" if engine.bfloat16_enabled() else "fp32"
    return EngineRecord(engine.zero_optimization_stage(), precision)


def _refuse_other_engines(engines: Mapping[str, Any], manifest: Manifest, folder: Path) -> None:
    """Another number of ranks and another ZeRO stage are welcome, another precision is not."""
    here = _describe(engines)
    if _precisions(here) != _precisions(manifest.engines):
        raise CheckpointError(
            f"{folder} holds {_readable(manifest.engines)}, this run has {_readable(here)}: give "
            "training.precision and the players of the save, as in config.yaml in that folder."
        )


def _precisions(engines: Mapping[str, EngineRecord]) -> dict[str, str]:
    return {name: record.precision for name, record in engines.items()}


def _readable(engines: Mapping[str, EngineRecord]) -> str:
    return ", ".join(f"{name} ({record})" for name, record in engines.items())


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


def _rng_file(folder: Path, number: int) -> Path:
    return folder / "rng" / f"rank_{number:05d}.pt"


def _versions() -> dict[str, str]:
    from lgpt import __version__

    return {
        "lgpt": __version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }
