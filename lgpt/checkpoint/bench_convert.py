"""`lgpt bench convert`: our conversion beside DeepSpeed's zero_to_fp32, on the same checkpoint.

Both run as commands of their own, from the start of Python to its end, and write safetensors.
What DeepSpeed's does not do is in our time: sha256 of what was written, and fsync.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from lgpt.checkpoint.sources import CheckpointPlace, find_checkpoint
from lgpt.checkpoint.synthetic_shards import write_synthetic_shards
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.core.logging import get_logger
from lgpt.data.progress import progress
from lgpt.engine.build import parameter_groups
from lgpt.engine.planned_model import planned_config
from lgpt.models.latent_gpt import LatentGPT
from lgpt.settings.phases import Phase2, RunSettings, TransformerRun

_MIB = 2**20
_SECONDS_BETWEEN_LOOKS = 0.01

_log = get_logger(__name__)


@dataclass(frozen=True)
class _Measured:
    """One run of a command; `error` is its message where it failed."""

    seconds: float
    peak_bytes: Optional[int]
    error: Optional[str]


def bench_written(
    run: RunSettings, stages: Sequence[int], *, ranks: int, work: Path, rounds: int
) -> list[dict[str, Any]]:
    """`bench_checkpoint` of checkpoints that are written for it, one a stage.

    Args:
        run: Its transformer is taken.
        stages: ZeRO stages, of 2 and 3.
        ranks: How many ranks seem to have saved them.
        work: Scratch folder, 22 bytes a parameter; what is written there is removed.
        rounds: Medians over them are given.

    Raises:
        SettingsError: The run trains no transformer, or a stage is another one.
        CheckpointError: A converter failed.
    """
    if isinstance(run, Phase2):
        raise SettingsError("--config names a run of phase 2; only transformers are written.")
    results = []
    for stage in stages:
        with _synthetic_checkpoint(run, stage=stage, ranks=ranks, work=work) as folder:
            results.append(bench_checkpoint(folder, work, rounds=rounds))
    _remove_if_empty(work)
    return results


def bench_checkpoint(source: Path, work: Path, *, rounds: int) -> dict[str, Any]:
    """Convert a checkpoint with both, one after the other, and compare time, memory and tensors.

    Args:
        source: The checkpoint, as for `convert_run`.
        work: Scratch folder for the outputs, twice the float32 model; they are removed.
        rounds: Medians over them are given.

    Returns:
        JSON values. Peak memory is the highest resident memory of the process, file pages it has
        mapped included; None where there is no /proc. `differing` names tensors that are not the
        same bit for bit. `safetensors_error` says why DeepSpeed's could not write safetensors
        (tied weights); it is then measured writing PyTorch files.

    Raises:
        CheckpointError: One of them failed.
    """
    place = find_checkpoint(source)
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="out_") as out:
        result = _compare(place, Path(out), rounds)
    _remove_if_empty(work)
    return {"checkpoint": str(source), **result}


def _compare(place: CheckpointPlace, work: Path, rounds: int) -> dict[str, Any]:
    source = place.engine_folder if place.step_folder is None else place.step_folder
    ours, theirs = work / "lgpt", work / "zero_to_fp32"
    mine: list[_Measured] = []
    other: list[_Measured] = []
    options, safetensors_error = ["--safe_serialization"], None
    with progress("bench convert", 2 * rounds, unit="conversions", is_shown=True) as advance:
        for _ in range(rounds):
            measured = _run_theirs(place, theirs, options)
            if measured.error is not None and options:
                options, safetensors_error = [], measured.error
                measured = _run_theirs(place, theirs, options)
            other.append(_succeeded(measured, "zero_to_fp32"))
            advance(1)
            shutil.rmtree(ours, ignore_errors=True)
            command = ["-m", "lgpt", "convert", "--no-ema", str(source), str(ours)]
            mine.append(_succeeded(_measure(command), "lgpt convert"))
            advance(1)
    written, expected = _tensors_of(ours), _tensors_of(theirs)
    same = {
        name
        for name in written.keys() & expected.keys()
        if _same_bits(written[name], expected[name])
    }
    return {
        "rounds": rounds,
        "written_bytes": sum(path.stat().st_size for path in ours.glob("*.safetensors")),
        "lgpt_seconds": statistics.median(each.seconds for each in mine),
        "zero_to_fp32_seconds": statistics.median(each.seconds for each in other),
        "time_ratio": statistics.median(a.seconds / b.seconds for a, b in zip(mine, other)),
        "lgpt_peak_bytes": _most(mine),
        "zero_to_fp32_peak_bytes": _most(other),
        "memory_ratio": _ratio(_most(mine), _most(other)),
        "tensors": len(expected),
        "differing": sorted((written.keys() | expected.keys()) - same),
        "safetensors_error": safetensors_error,
    }


def convert_table(results: Sequence[dict[str, Any]]) -> Table:
    """The results of `bench_convert` for people."""
    table = Table(title="lgpt convert beside DeepSpeed's zero_to_fp32")
    for heading in ("checkpoint", "", "lgpt", "zero_to_fp32", "ratio"):
        table.add_column(heading, justify="left" if heading in ("checkpoint", "") else "right")
    for result in results:
        table.add_row(
            result["checkpoint"],
            "seconds",
            f"{result['lgpt_seconds']:.1f}",
            f"{result['zero_to_fp32_seconds']:.1f}",
            f"{result['time_ratio']:.2f}",
        )
        table.add_row(
            f"{result['written_bytes'] / _MIB:,.0f} MiB of weights",
            "peak memory",
            _mib(result["lgpt_peak_bytes"]),
            _mib(result["zero_to_fp32_peak_bytes"]),
            "unknown" if result["memory_ratio"] is None else f"{result['memory_ratio']:.2f}",
        )
        told = f"all {result['tensors']}" if not result["differing"] else "NOT the same"
        table.add_row("", "tensors, bit for bit", told, ", ".join(result["differing"][:3]), "")
        if result["safetensors_error"] is not None:
            table.add_row("", "safetensors", "written", result["safetensors_error"][:60], "")
    return table


@contextmanager
def _synthetic_checkpoint(
    run: TransformerRun, *, stage: int, ranks: int, work: Path
) -> Iterator[Path]:
    """A checkpoint of a run's transformer as DeepSpeed would save it, gone at the end.

    Args:
        run: Its transformer.
        stage: 2 or 3.
        ranks: How many ranks seem to have saved it.
        work: Where it is written: 14 bytes a parameter.
    """
    config = planned_config(run)
    with torch.device("meta"):
        model = LatentGPT(config)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {name_of[id(parameter)]: tuple(parameter.shape) for parameter in group["params"]}
        for group in parameter_groups(model, 0.1)
    ]
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix=f"zero{stage}_") as home:
        folder = Path(home) / "global_step1"
        _log.info("writing a ZeRO-%d checkpoint of %d ranks to %s", stage, ranks, folder)
        write_synthetic_shards(folder, groups, stage=stage, ranks=ranks)
        yield folder


def _remove_if_empty(work: Path) -> None:
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def _run_theirs(place: CheckpointPlace, out: Path, options: Sequence[str]) -> _Measured:
    shutil.rmtree(out, ignore_errors=True)
    folder = place.engine_folder
    command = ["-m", "deepspeed.utils.zero_to_fp32", str(folder.parent), str(out), *options]
    return _measure([*command, "-t", folder.name])


def _succeeded(measured: _Measured, what: str) -> _Measured:
    if measured.error is not None:
        raise CheckpointError(f"{what} failed: {measured.error}")
    return measured


def _measure(arguments: Sequence[str]) -> _Measured:
    """Run Python with these arguments, and look at its resident memory while it runs."""
    with tempfile.TemporaryFile("w+") as told:
        started_at = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=told, text=True
        )
        peak: Optional[int] = None
        while process.poll() is None:
            peak = _peak_of(process.pid) or peak
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        seconds = time.perf_counter() - started_at
        told.seek(0)
        lines = [line.strip() for line in told if line.strip()]
    return _Measured(seconds, peak, None if process.returncode == 0 else _error_among(lines))


def _error_among(lines: Sequence[str]) -> str:
    """What a command failed with: the exception that ends a traceback, or its last line."""
    ends = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return " ".join(lines[ends[-1] if ends else -1 :])[:400] or "no message"


def _peak_of(pid: int) -> Optional[int]:
    """Highest resident memory so far (VmHWM), which rusage mixes up with the parent's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) * 1024 if found else None


def _tensors_of(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor that a converter wrote, tied ones under all of their names."""
    readers: dict[str, Callable[[], Tensor]] = {}
    for path in folder.glob("*.safetensors"):
        stored = safe_open(path, "pt")
        mine = {name: partial(stored.get_tensor, name) for name in stored.keys()}  # noqa: SIM118
        aliases = {a: mine[n] for a, n in (stored.metadata() or {}).items() if n in mine}
        readers.update({**aliases, **mine})
    for path in folder.glob("*.bin"):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        readers.update({name: partial(torch.clone, tensor) for name, tensor in tensors.items()})
    return readers


def _same_bits(read_first: Callable[[], Tensor], read_second: Callable[[], Tensor]) -> bool:
    first, second = read_first(), read_second()
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (first, second))
    return torch.equal(one, other)


def _most(measured: Sequence[_Measured]) -> Optional[int]:
    peaks = [each.peak_bytes for each in measured if each.peak_bytes is not None]
    return max(peaks) if peaks else None


def _ratio(first: Optional[int], second: Optional[int]) -> Optional[float]:
    return None if not first or not second else first / second


def _mib(count: Optional[int]) -> str:
    return "unknown" if count is None else f"{count / _MIB:,.0f} MiB"
