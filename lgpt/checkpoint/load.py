"""Going back to a checkpoint: the newest whole one, and its state in engines and generators.

DeepSpeed unpickles its own files, code and all, when it loads them: resume only from run
folders that you trust. Conversion (convert.py) does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch

from lgpt.checkpoint.agreement import on_all_ranks
from lgpt.checkpoint.average_files import average_file, read_average
from lgpt.checkpoint.checks import record_check
from lgpt.checkpoint.elastic import load_engine_elastically
from lgpt.checkpoint.folders import problems_known_of, step_folders
from lgpt.checkpoint.manifest import EngineRecord, Manifest, problems_of_files, read_manifest
from lgpt.checkpoint.retention import put_back_replaced
from lgpt.checkpoint.rng import branch_rng_state, restore_rng_state
from lgpt.core.distributed import is_rank_zero, rank, world_size
from lgpt.core.errors import CheckpointError
from lgpt.core.logging import get_logger
from lgpt.engine.average import WeightAverage
from lgpt.engine.ranks import broadcast_from_rank_zero, gather_to_rank_zero

TRAINER_STATE = "trainer_state.json"

_log = get_logger(__name__)


def find_whole_checkpoint(run_folder: Path) -> Optional[Path]:
    """The newest checkpoint of which every byte is as it was saved. All ranks call it.

    Each rank reads its share. One that is damaged is told with its reason and skipped.

    Returns:
        None where no checkpoint was ever completed.

    Raises:
        CheckpointError: On every rank: there are some, and none is whole.
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
    if candidates:
        raise CheckpointError(
            f"None of the {len(candidates)} checkpoints in {run_folder / 'checkpoints'} is whole, "
            "and nothing begins anew over them. Is their disk back? Then start again; or bring a "
            "copy back; or give another name= (or move that folder away) to begin at step 0."
        )
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
        if is_same_world and manifest.engines[name] == describe_engine(engine):
            _load_engine(engine, folder, name)
            if average is not None and has_average:
                _load_average(average, folder / name)
        else:
            load_engine_elastically(engine, folder / name, average if has_average else None)
        if has_average != (average is not None):
            _begin_or_end_average(average, folder / name, manifest.step)
    if is_same_world:
        restore_rng_state(torch.load(rng_file(folder, rank()), weights_only=True))
    else:
        branch_rng_state(torch.load(rng_file(folder, 0), weights_only=True))
    state: dict[str, Any] = json.loads((folder / TRAINER_STATE).read_text())
    return state


def describe(engines: Mapping[str, Any]) -> dict[str, EngineRecord]:
    """What a manifest says of each engine."""
    return {name: describe_engine(engine) for name, engine in engines.items()}


def describe_engine(engine: Any) -> EngineRecord:
    """What a manifest says of one."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp32"
    return EngineRecord(engine.zero_optimization_stage(), precision)


def rng_file(folder: Path, number: int) -> Path:
    """Where the generators of one rank are kept."""
    return folder / "rng" / f"rank_{number:05d}.pt"


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


def _refuse_other_engines(engines: Mapping[str, Any], manifest: Manifest, folder: Path) -> None:
    """Another number of ranks and another ZeRO stage are welcome, another precision is not."""
    here = describe(engines)
    if _precisions(here) != _precisions(manifest.engines):
        raise CheckpointError(
            f"{folder} holds {_readable(manifest.engines)}, this run has {_readable(here)}: give "
            "training.precision and the players of the save, as in config.yaml in that folder."
        )


def _precisions(engines: Mapping[str, EngineRecord]) -> dict[str, str]:
    return {name: record.precision for name, record in engines.items()}


def _readable(engines: Mapping[str, EngineRecord]) -> str:
    return ", ".join(f"{name} ({record})" for name, record in engines.items())
