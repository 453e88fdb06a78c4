"""What the training loop sees of tracking: log, picture, finish. Rank 0 only; the caller guards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional, Union

from lgpt.core.errors import LgptError
from lgpt.core.logging import get_logger
from lgpt.tracking.metrics_file import MetricLine, MetricsFile
from lgpt.tracking.mlflow_run import tracking_uri
from lgpt.tracking.shipping import Shipment, Shipper, load_shipment

_log = get_logger(__name__)


class RunTracker:
    """Metrics of one run: to metrics.jsonl at once, to MLflow when it takes them.

    No method raises because of MLflow or waits for it; only `finish` gives it some seconds.
    Made by `RunTracker.start`.
    """

    def __init__(
        self, run_folder: Path, metrics_file: MetricsFile, shipper: Optional[Shipper]
    ) -> None:
        self._run_folder = run_folder
        self._metrics_file = metrics_file
        self._shipper = shipper
        self._has_told_disk_error = False
        self._is_finished = False

    @classmethod
    def start(
        cls,
        run_folder: Path,
        *,
        uri: Optional[str],
        experiment: str,
        run_name: str,
        tags: Mapping[str, str],
        parameters: Mapping[str, object],
        artifacts: Sequence[Path],
        enabled: bool,
    ) -> RunTracker:
        """Open metrics.jsonl and, in the background, the MLflow run; the same run after a restart.

        Args:
            run_folder: `runs/<name>`; its parent holds mlflow.db when no URI is given.
            uri: Tracking URI; default MLFLOW_TRACKING_URI, else `<runs>/mlflow.db`.
            experiment: Created when missing.
            run_name: As shown in MLflow.
            tags: Run tags.
            parameters: Logged once; MLflow keeps the first value of each.
            artifacts: Files to attach, such as the resolved configs.
            enabled: False: metrics.jsonl only.
        """
        metrics_file = MetricsFile(run_folder)
        if not enabled:
            return cls(run_folder, metrics_file, None)
        shipment = Shipment(
            uri=tracking_uri(uri, run_folder.parent),
            experiment=experiment,
            run_name=run_name,
            tags=dict(tags),
            parameters={name: str(value) for name, value in parameters.items()},
            artifacts=[str(path.resolve()) for path in artifacts],
        ).going_on_from(load_shipment(run_folder))
        shipper = Shipper(run_folder, metrics_file, shipment)
        shipper.start()
        return cls(run_folder, metrics_file, shipper)

    @property
    def mlflow_run_id(self) -> Optional[str]:
        """The MLflow run; None without MLflow, or while it has not answered yet."""
        return None if self._shipper is None else self._shipper.run_id

    def log(self, step: int, metrics: Mapping[str, Union[int, float]]) -> None:
        """Add one line to metrics.jsonl; NaN and infinities are kept."""
        try:
            values = {name: float(value) for name, value in metrics.items()}
            self._metrics_file.append(MetricLine(step, time.time(), values))
        except OSError as error:
            if not self._has_told_disk_error:
                _log.warning("metrics of step %d are lost, cannot write them: %s", step, error)
            self._has_told_disk_error = True
        if self._shipper is not None:
            self._shipper.wake()

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a picture file in MLflow; the file must stay where it is."""
        if self._shipper is not None:
            self._shipper.add_picture(name, step, path.resolve())

    def truncate_after(self, step: int) -> None:
        """Drop lines of later steps, which a resumed run is about to make again.

        MLflow cannot forget points: there, a repeated step shows twice.
        """
        if self._shipper is not None:
            self._shipper.truncate_after(step)
        else:
            self._metrics_file.truncate_after(step)

    def finish(self, status: str, deadline_seconds: float = 30.0) -> None:
        """Send the rest, close the run as FINISHED, KILLED or FAILED. Never raises.

        Called again, as by an error handler further out, it does nothing: the first status stands.

        Args:
            status: MLflow's word for how the run ended.
            deadline_seconds: How long MLflow may take; what is not sent then can be sent later.
        """
        if self._is_finished:
            return
        self._is_finished = True
        try:
            self._metrics_file.close()
        except OSError as error:
            _log.warning("the last metrics are lost, cannot write them: %s", error)
        problem = None if self._shipper is None else self._shipper.stop(status, deadline_seconds)
        if self._shipper is not None and problem is not None:
            _log.warning(
                "MLflow did not take the last %d bytes of %s or the run's end (%s); send them "
                "later with: lgpt mlflow sync %s",
                self._shipper.unsent_bytes(),
                self._run_folder / "metrics.jsonl",
                problem,
                self._run_folder,
            )


def replay(run_folder: Path) -> str:
    """Send MLflow what it does not have of a run, now, and wait for it.

    Returns:
        The id of the MLflow run, which then holds every line of metrics.jsonl.

    Raises:
        LgptError: The folder is no tracked run, or MLflow does not answer.
    """
    shipment = load_shipment(run_folder)
    if shipment is None:
        raise LgptError(
            f"{run_folder} holds no mlflow_run.json: give the folder of a run that was started "
            "with tracking.enabled=true."
        )
    metrics_file = MetricsFile(run_folder)
    shipper = Shipper(run_folder, metrics_file, shipment)
    try:
        shipper.ship_all()
    except Exception as error:  # mlflow, sqlalchemy, requests and OSError have no common parent
        raise LgptError(
            f"MLflow at {shipment.uri} does not take the metrics of {run_folder} "
            f"({type(error).__name__}: {error}); start the server and run this again."
        ) from error
    finally:
        metrics_file.close()
    assert shipment.run_id is not None
    return shipment.run_id
