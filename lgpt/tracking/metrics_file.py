"""metrics.jsonl: one JSON object a line, the truth about a run's metrics.

    {"step": 120, "time": 1767225600.25, "train/loss": 5.31, "train/gradient_norm": "NaN"}

`time` is in unix seconds. JSON knows no NaN and no infinity: they are written as the strings "NaN",
"Infinity" and "-Infinity", which `float()` reads back.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Union

from lgpt.core.files import write_bytes_atomically

FILE_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class MetricLine:
    """One line: metrics of one step at one time (unix seconds)."""

    step: int
    time: float
    metrics: dict[str, float]


def read_metrics(run_folder: Path) -> list[MetricLine]:
    """Every whole line of a run's metrics.jsonl, oldest first; empty when there is none."""
    path = run_folder / FILE_NAME
    if not path.is_file():
        return []
    return [_parse(line) for line in path.read_bytes().splitlines(keepends=True) if _is_whole(line)]


class MetricsFile:
    """The metrics.jsonl of one run, appended by the training loop and read by the MLflow thread."""

    def __init__(self, run_folder: Path) -> None:
        run_folder.mkdir(parents=True, exist_ok=True)
        self._path = run_folder / FILE_NAME
        self._lock = threading.Lock()
        self._cut_half_line()
        self._stream: IO[bytes] = self._path.open("ab")

    def append(self, line: MetricLine) -> None:
        """Add a line and hand it to the operating system at once."""
        record: dict[str, object] = {"step": line.step, "time": line.time}
        record.update({name: _to_json(value) for name, value in line.metrics.items()})
        with self._lock:
            self._stream.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._stream.flush()

    def truncate_after(self, step: int, offset: int = 0) -> int:
        """Drop the lines of later steps.

        Args:
            step: The last step that is kept.
            offset: A place in the file before the cut, in bytes.

        Returns:
            Where the line at `offset` is now.
        """
        with self._lock:
            self._stream.close()
            place, kept, kept_before_offset = 0, [], 0
            for line in self._path.read_bytes().splitlines(keepends=True):
                if _parse(line).step <= step:
                    kept.append(line)
                    if place < offset:
                        kept_before_offset += len(line)
                place += len(line)
            if sum(map(len, kept)) < place:
                write_bytes_atomically(self._path, b"".join(kept))
            self._stream = self._path.open("ab")
        return kept_before_offset

    def read_from(self, offset: int, max_metrics: int) -> tuple[list[MetricLine], int]:
        """Whole lines from `offset` (bytes) with at most `max_metrics` values, and where they end.

        A single line with more values than that comes alone.
        """
        lines: list[MetricLine] = []
        count = 0
        with self._lock, self._path.open("rb") as stream:
            stream.seek(offset)
            for raw in stream:
                if not _is_whole(raw):
                    break
                line = _parse(raw)
                count += len(line.metrics)
                if lines and count > max_metrics:
                    break
                lines.append(line)
                offset += len(raw)
        return lines, offset

    def size(self) -> int:
        """Bytes in the file."""
        return self._path.stat().st_size

    def close(self) -> None:
        """Close the file; reading stays possible."""
        with self._lock:
            self._stream.close()

    def _cut_half_line(self) -> None:
        """A kill in the middle of a write leaves half a line; it goes, so that lines stay JSON."""
        if not self._path.exists():
            return
        whole = self._path.read_bytes().rfind(b"\n") + 1
        if whole < self._path.stat().st_size:
            os.truncate(self._path, whole)


def _is_whole(line: bytes) -> bool:
    return line.endswith(b"\n")


def _parse(line: bytes) -> MetricLine:
    record: Mapping[str, object] = json.loads(line)
    metrics = {
        name: float(str(value)) for name, value in record.items() if name not in ("step", "time")
    }
    return MetricLine(int(str(record["step"])), float(str(record["time"])), metrics)


def _to_json(value: float) -> Union[float, str]:
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")
