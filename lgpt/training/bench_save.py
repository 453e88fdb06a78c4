"""`lgpt bench save`: the training time that a checkpoint costs, waited for or in the background."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from rich.table import Table

from lgpt.checkpoint.retention import Keep
from lgpt.checkpoint.store import PendingSave, begin_save, complete_save, save_checkpoint
from lgpt.core.distributed import seed_everything
from lgpt.core.errors import SettingsError
from lgpt.data.progress import progress
from lgpt.engine.clock import seconds_when_done
from lgpt.engine.planned_model import planned_config
from lgpt.models.latent_gpt import LatentGPTConfig
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.phases import TransformerRun
from lgpt.settings.training import BatchSettings
from lgpt.training.bench_train_process import OurStep

KINDS = ("no save", "blocking", "asynchronous")


def bench_save(
    run: TransformerRun, *, steps: int, rounds: int, words: int, work: Path
) -> dict[str, Any]:
    """Train a run's transformer on random tokens, with and without a save, in one process.

    Args:
        run: Transformer, blocks, precision, DeepSpeed config and `batch.micro_batch_images`.
        steps: Optimizer steps of one measurement; a save comes after the first.
        rounds: In each, every kind has its turn; medians over them are given.
        words: Text tokens a picture.
        work: New folder on the disk that is meant; removed at the end.

    Returns:
        JSON values. Time lost is a measurement's time less that of the same steps without a save;
        a background save that is not done after the last step is waited for.

    Raises:
        SettingsError: `work` is there already.
    """
    if work.exists():
        raise SettingsError(f"--work {work} exists; give a folder that may be made and removed.")
    config = planned_config(run)
    trainer = _Trainer(run, config, words)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    stalls: list[float] = []
    try:
        total = (rounds + 1) * len(KINDS)
        with progress("bench save", total, unit="measurements", is_shown=True) as advance:
            for number in range(-1, rounds):  # what the first round pays for alone is not counted
                for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                    taken, stall = trainer.measure(kind, steps, work)
                    if number >= 0:
                        seconds[kind].append(taken)
                        stalls += [stall] if kind == "asynchronous" else []
                    advance(1)
        newest = max((work / "checkpoints").glob("step_*"), key=lambda path: path.stat().st_mtime)
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _summary(seconds, stalls, steps=steps, size=size, threads=torch.get_num_threads())


class _Trainer:
    """A run's transformer in its engine, stepping on random tokens."""

    def __init__(self, run: TransformerRun, config: LatentGPTConfig, words: int) -> None:
        self.batch, self.words, self.config = run.batch.micro_batch_images, words, config
        one_step = BatchSettings(global_batch_images=self.batch, micro_batch_images=self.batch)
        batched = run.model_copy(update={"batch": one_step})
        task = {
            "blocks": run.blocks.model_dump(),
            "optimizer": run.optimizer.model_dump(),
            "deepspeed": resolve_deepspeed_config(batched, 1),
            "precision": run.training.precision,
        }
        seed_everything(0)
        self.training = OurStep(task, config)
        self.taken = 0

    def measure(self, kind: str, steps: int, work: Path) -> tuple[float, float]:
        """Seconds of some steps with one save of this kind, and of its call alone."""
        device, pending, stall = self.training.device, None, 0.0
        started_at = seconds_when_done(device)
        for number in range(steps):
            self._step()
            pending = _completed_if_written(pending)
            if number == 0 and kind != "no save":
                before = seconds_when_done(device)
                pending = self._save(kind, work)
                stall = seconds_when_done(device) - before
        if pending is not None:
            complete_save(pending)
        return seconds_when_done(device) - started_at, stall

    def _step(self) -> None:
        shape, device = (self.batch, self.config.num_tokens), self.training.device
        tokens = torch.randint(self.config.codebook_size, shape, device=device)
        text = self.training.text(self.batch, self.words, self.config.text_width)
        self.training.backward(self.training.forward(tokens, text))
        self.training.step()
        self.taken += 1

    def _save(self, kind: str, work: Path) -> Optional[PendingSave]:
        content: Mapping[str, Any] = {
            "trainer_state": {"step": self.taken},
            "keep": Keep(2),
            "extra_files": {},
        }
        engines = {"model": self.training.engine}
        if kind == "asynchronous":
            return begin_save(engines, work, self.taken, **content)
        save_checkpoint(engines, work, self.taken, **content)
        return None


def _completed_if_written(pending: Optional[PendingSave]) -> Optional[PendingSave]:
    if pending is None or not pending.is_written:
        return pending
    complete_save(pending)
    return None


def _summary(
    seconds: Mapping[str, list[float]], stalls: list[float], *, steps: int, size: int, threads: int
) -> dict[str, Any]:
    plain = seconds["no save"]
    lost = {
        kind: [with_save - without for with_save, without in zip(seconds[kind], plain)]
        for kind in KINDS[1:]
    }
    medians = {kind: statistics.median(values) for kind, values in lost.items()}
    return {
        "steps": steps,
        "rounds": len(plain),
        "threads": threads,
        "checkpoint_bytes": size,
        "step_seconds": statistics.median(plain) / steps,
        "seconds": {kind: statistics.median(values) for kind, values in seconds.items()},
        "lost_seconds": medians,
        "asynchronous_call_seconds": statistics.median(stalls),
        "lost_ratio": medians["asynchronous"] / medians["blocking"],
    }


def save_table(result: dict[str, Any]) -> Table:
    """The result of `bench_save` for people."""
    table = Table(
        title=f"{result['steps']} steps of {result['step_seconds']:.3f} s with a checkpoint of "
        f"{result['checkpoint_bytes'] / 2**20:,.0f} MiB, medians of {result['rounds']} rounds"
    )
    for column in ("", "seconds", "lost to the save"):
        table.add_column(column, justify="right" if column else "left")
    for kind, seconds in result["seconds"].items():
        lost = result["lost_seconds"].get(kind)
        table.add_row(kind, f"{seconds:.2f}", "" if lost is None else f"{lost:.2f}")
    table.caption = (
        f"asynchronous loses {result['lost_ratio']:.0%} of what blocking does; its call alone "
        f"takes {result['asynchronous_call_seconds']:.2f} s"
    )
    return table
