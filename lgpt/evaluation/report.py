"""`lgpt report`: what runs have reached, read from their run folders alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from rich.table import Table

from lgpt.core.errors import DataError
from lgpt.settings.run import load_run_settings
from lgpt.tracking.metrics_file import read_metrics

_VALIDATION = (
    "val_psnr_db",
    "val_ssim",
    "val_lpips",
    "val_rfid",
    "val_codebook_usage",
    "val_perplexity",
    "val_dead_codes",
)
_MAIN_LOSS = {1: "ce_loss", 2: "recon_loss", 3: "ce_loss"}


def run_report(run_folder: Path) -> dict[str, Any]:
    """Phase, steps, seconds, last losses and accuracies of one run.

    Keys: name, phase, step, max_steps, is_done, elapsed_seconds, final_loss, validation_loss,
        loss_name, validation, and evaluation (`<run>/model/evaluation.json`, or None).

    Raises:
        DataError: The folder is not a run folder.
    """
    config = run_folder / "config.yaml"
    if not config.exists():
        raise DataError(f"{run_folder} is not a run folder: it has no config.yaml.")
    run = load_run_settings(config, environ={}, check_deepspeed=False)
    loss_name = _MAIN_LOSS[run.phase]
    lines = read_metrics(run_folder)
    records = [dict(line.metrics) for line in lines]
    evaluation = run_folder / "model" / "evaluation.json"
    return {
        "name": run.name,
        "phase": run.phase,
        "step": max((line.step for line in lines), default=0),
        "max_steps": run.training.max_steps,
        "is_done": (run_folder / "DONE").exists(),
        "elapsed_seconds": _last(records, "elapsed_seconds"),
        "loss_name": loss_name,
        "final_loss": _last(records, loss_name),
        "validation_loss": _last(records, f"val_{loss_name}"),
        "validation": {
            key: _last(records, key) for key in _VALIDATION if _last(records, key) is not None
        },
        "evaluation": json.loads(evaluation.read_text()) if evaluation.exists() else None,
    }


def _last(records: Sequence[dict[str, Any]], key: str) -> Optional[float]:
    return next((record[key] for record in reversed(records) if key in record), None)


def report_table(reports: Sequence[dict[str, Any]]) -> Table:
    """One row a run: phase, steps, time, final loss, validation loss, what was measured."""
    table = Table()
    for heading in ("run", "phase", "steps", "time", "final loss", "validation loss", "measured"):
        table.add_column(heading, justify="left" if heading in ("run", "measured") else "right")
    for report in reports:
        steps = f"{report['step']}/{report['max_steps']}"
        table.add_row(
            report["name"],
            str(report["phase"]),
            steps if report["is_done"] else f"{steps} (not done)",
            _minutes(report["elapsed_seconds"]),
            _number(report["final_loss"]),
            _number(report["validation_loss"]),
            _measured(report),
        )
    return table


def _minutes(seconds: Optional[float]) -> str:
    return "-" if seconds is None else f"{int(seconds // 60)}m{int(seconds % 60):02d}s"


def _number(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.4f}"


def _measured(report: dict[str, Any]) -> str:
    lines = []
    validation = report["validation"]
    if "val_psnr_db" in validation:
        parts = [f"PSNR {validation['val_psnr_db']:.1f} dB"]
        parts += [
            f"{name} {validation[key]:{form}}"
            for name, key, form in (
                ("SSIM", "val_ssim", ".3f"),
                ("LPIPS", "val_lpips", ".3f"),
                ("rFID", "val_rfid", ".2f"),
                ("codes used", "val_codebook_usage", ".0%"),
            )
            if key in validation
        ]
        lines.append(", ".join(parts))
    for name, accuracy in (report["evaluation"] or {}).get("prompt_accuracy", {}).items():
        parts = ", ".join(
            f"{attribute} {100 * value:.0f}%"
            for attribute, value in accuracy.items()
            if isinstance(value, float)
        )
        lines.append(f"{name}: {parts}")
    return "\n".join(lines) or "-"
