"""The thread between metrics.jsonl and MLflow.

The file is the queue: how far it has been sent is kept in `mlflow_run.json`, so a server that is
away, a killed process or a new start lose nothing, and memory does not grow. The training loop
never waits here.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Optional

from lgpt.core.files import write_json_atomically
from lgpt.core.logging import get_logger
from lgpt.tracking.metrics_file import MetricsFile
from lgpt.tracking.mlflow_run import METRICS_PER_REQUEST, MlflowRun, first_line

FILE_NAME = "mlflow_run.json"
_PAUSE_SECONDS = 1.0  # one request a second at most, however often the loop logs
_FAILURES_BEFORE_WARNING = 3
_LONGEST_WAIT_SECONDS = 60.0
_TRIES_OF_A_FILE = 3

_log = get_logger(__name__)


@dataclass
class Shipment:
    """What MLflow is to hold and how much of it is there; stored as mlflow_run.json."""

    uri: str
    experiment: str
    run_name: str
    tags: dict[str, str]
    parameters: dict[str, str]
    artifacts: list[str]
    run_id: Optional[str] = None
    shipped_bytes: int = 0
    pictures: list[tuple[str, int, str]] = field(default_factory=list)
    status: str = "RUNNING"

    def going_on_from(self, earlier: Optional[Shipment]) -> Shipment:
        """This description with the earlier start's run, unless it was in another place."""
        if earlier is None or (earlier.uri, earlier.experiment) != (self.uri, self.experiment):
            return self
        return replace(
            self,
            run_id=earlier.run_id,
            shipped_bytes=earlier.shipped_bytes,
            pictures=earlier.pictures,
        )


def load_shipment(run_folder: Path) -> Optional[Shipment]:
    """The stored shipment of a run folder, None when there is none that can be read."""
    path = run_folder / FILE_NAME
    try:
        stored = json.loads(path.read_text())
        stored["pictures"] = [(str(n), int(s), str(p)) for n, s, p in stored["pictures"]]
        return Shipment(**stored)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        _log.warning("%s is damaged (%s): a new MLflow run is made", path, error)
        return None


class Shipper:
    """Sends a run's metrics, pictures and end to MLflow, in its own thread or once in the caller's.

    Args:
        run_folder: Holds mlflow_run.json.
        metrics_file: The queue.
        shipment: What to send, and from where on.
    """

    def __init__(self, run_folder: Path, metrics_file: MetricsFile, shipment: Shipment) -> None:
        self._run_folder = run_folder
        self._metrics_file = metrics_file
        self._shipment = shipment
        self._shipment.shipped_bytes = min(shipment.shipped_bytes, metrics_file.size())
        self._cuts = 0
        self._lock = threading.Lock()  # held for memory and small files, never over the network
        self._run: Optional[MlflowRun] = None
        self._has_sent_artifacts = False
        self._file_failures: dict[str, int] = {}
        self._has_work = threading.Event()
        self._is_stopping = threading.Event()
        self._has_ended_well = False
        self._last_error = "no answer yet"
        self._thread = threading.Thread(target=self._work, name="lgpt-mlflow", daemon=True)

    def start(self) -> None:
        """Begin to send what is there."""
        self._save()
        self._has_work.set()
        self._thread.start()

    @property
    def run_id(self) -> Optional[str]:
        """The MLflow run's id; None until MLflow has answered once."""
        return self._shipment.run_id

    def wake(self) -> None:
        """There is a new line."""
        self._has_work.set()

    def add_picture(self, name: str, step: int, path: Path) -> None:
        """Queue a picture file."""
        with self._lock:
            self._shipment.pictures.append((name, step, str(path)))
        self._has_work.set()

    def truncate_after(self, step: int) -> None:
        """Cut metrics.jsonl without losing the place of what was sent."""
        with self._lock:
            self._cuts += 1
            self._shipment.shipped_bytes = self._metrics_file.truncate_after(
                step, self._shipment.shipped_bytes
            )
        self._save()

    def stop(self, status: str, deadline_seconds: float) -> Optional[str]:
        """Send the rest and the end within the deadline; None when all arrived, else why not."""
        with self._lock:
            self._shipment.status = status
        self._is_stopping.set()
        self._has_work.set()
        self._thread.join(deadline_seconds)
        self._save()
        return None if self._has_ended_well else self._last_error

    def unsent_bytes(self) -> int:
        """How much of metrics.jsonl MLflow does not have yet."""
        with self._lock:
            return self._metrics_file.size() - self._shipment.shipped_bytes

    def ship_all(self) -> None:
        """Send everything that is not there yet. Blocking; raises what mlflow raises."""
        run = self._run or self._open_run()
        while True:
            with self._lock:
                cuts = self._cuts
                lines, end = self._metrics_file.read_from(
                    self._shipment.shipped_bytes, METRICS_PER_REQUEST
                )
            if not lines:
                break
            run.log_metrics(lines)
            with self._lock:
                if cuts == self._cuts:
                    self._shipment.shipped_bytes = end
            self._save()
        if self._shipment.status != "RUNNING":
            run.finish(self._shipment.status)
        self._ship_files(run)

    def _ship_files(self, run: MlflowRun) -> None:
        """Configs and pictures, last: their store may be another than the metrics', and closed.

        What fails is tried again in later rounds, a few times; nothing else waits for it. It stays
        in the queue, for a later start or `lgpt mlflow sync`.
        """
        if not self._has_sent_artifacts:
            artifacts = [Path(path) for path in self._shipment.artifacts]
            self._has_sent_artifacts = self._sends("the configs", run.log_artifacts, artifacts)
        with self._lock:
            pictures = list(self._shipment.pictures)
        for name, step, path in pictures:
            if self._sends(f"picture {path}", run.log_picture, name, step, Path(path)):
                with self._lock:
                    self._shipment.pictures.remove((name, step, path))
                self._save()

    def _sends(self, what: str, send: Callable[..., None], *arguments: object) -> bool:
        """Send a file unless it failed too often; True when it is there."""
        if self._file_failures.get(what, 0) >= _TRIES_OF_A_FILE:
            return False
        try:
            send(*arguments)
        # An artifact store raises what it likes: MLflow's errors, its own client's, OSError.
        except Exception as error:
            if not self._file_failures:
                _log.warning(
                    "MLflow takes the metrics of %s, but not %s (%s: %s): files are tried again a "
                    "few times (told once)",
                    self._run_folder,
                    what,
                    type(error).__name__,
                    first_line(error),
                )
            self._file_failures[what] = self._file_failures.get(what, 0) + 1
            return False
        return True

    def _open_run(self) -> MlflowRun:
        shipment = self._shipment
        run = MlflowRun(shipment.uri, shipment.experiment, shipment.run_name, shipment.run_id)
        with self._lock:
            shipment.run_id = run.run_id
            if run.is_new:
                shipment.shipped_bytes = 0
        self._save()
        run.describe(shipment.tags, shipment.parameters)
        self._run = run
        _log.info(
            "MLflow: %s run %s in %s, experiment %s",
            "new" if run.is_new else "going on with",
            run.run_id,
            shipment.uri,
            shipment.experiment,
        )
        return run

    def _work(self) -> None:
        failures = 0
        while True:
            self._has_work.wait()
            self._has_work.clear()
            was_stopping = self._is_stopping.is_set()
            try:
                self.ship_all()
            # The one wall that training stands behind: whatever mlflow, sqlite or the network raise
            # ends here, and the lines stay in the file.
            except Exception as error:
                failures += 1
                self._last_error = f"{type(error).__name__}: {first_line(error)}"
                self._tell_failure(failures)
                self._has_work.set()
            else:
                if failures >= _FAILURES_BEFORE_WARNING:
                    _log.info("MLflow answers again: all metrics so far are there")
                failures = 0
                self._has_ended_well = was_stopping
            if was_stopping:
                return
            wait = min(_LONGEST_WAIT_SECONDS, _PAUSE_SECONDS * 2**failures)
            self._is_stopping.wait(wait)

    def _tell_failure(self, failures: int) -> None:
        if failures == _FAILURES_BEFORE_WARNING:
            _log.warning(
                "MLflow at %s takes nothing (%s): training goes on, metrics are kept in %s "
                "and are sent as soon as it answers",
                self._shipment.uri,
                self._last_error,
                self._run_folder / "metrics.jsonl",
            )

    def _save(self) -> None:
        """Store the shipment; a full or read-only disk must not end the run."""
        with self._lock:
            try:
                write_json_atomically(self._run_folder / FILE_NAME, asdict(self._shipment))
            except OSError as error:
                _log.warning("cannot write %s: %s", self._run_folder / FILE_NAME, error)
