"""One run in MLflow: every call that leaves the process. Blocking; for the shipping thread only.

Works with mlflow 2.16 to 3.17. Only `MlflowClient` methods are used: the fluent functions of 3.0
and 3.1 make blocking extra requests, and their global state belongs to notebooks.
"""

from __future__ import annotations

import logging
import logging.config
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

from lgpt.core.logging import get_logger
from lgpt.tracking.metrics_file import MetricLine

METRICS_PER_REQUEST = 1000  # MLflow's own limit for one log_batch
_PARAMETERS_PER_REQUEST = 100
_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_LONGEST_PARAMETER = 6000  # longer ones are cut in silence by the server
_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

_log = get_logger(__name__)


def tracking_uri(uri: Optional[str], runs_folder: Path) -> str:
    """Where to track: `uri`, else MLFLOW_TRACKING_URI, else the sqlite file of the runs folder."""
    return (
        uri or os.environ.get(_URI_VARIABLE) or f"sqlite:///{runs_folder.resolve() / 'mlflow.db'}"
    )


class MlflowRun:
    """An open run. All methods raise what mlflow or the network raises.

    Args:
        uri: Tracking server or database.
        experiment: Created when it is missing.
        run_name: Shown in MLflow's page.
        run_id: The run to go on with; a new one is made when it is None or no longer there.
    """

    def __init__(self, uri: str, experiment: str, run_name: str, run_id: Optional[str]) -> None:
        self._refusals_told = 0
        with _surroundings_left_alone():
            self._client = _make_client(uri)
            self.is_new = run_id is None or not self._reopen(run_id)
        if self.is_new:
            experiment_id = self._experiment_id(uri, experiment)
            run_id = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        assert run_id is not None
        self.run_id = run_id

    def describe(self, tags: Mapping[str, str], parameters: Mapping[str, str]) -> None:
        """Set tags and parameters. MLflow never changes a parameter: other values are only told."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.run_id).data.params
        new = {
            name: value[:_LONGEST_PARAMETER]
            for name, value in parameters.items()
            if name not in known
        }
        changed = [
            f"{name} {known[name]} -> {value}"
            for name, value in parameters.items()
            if name in known and known[name] != value[:_LONGEST_PARAMETER]
        ]
        if changed:
            _log.warning("MLflow keeps the run's first parameters; now: %s", ", ".join(changed))
        items = [Param(_safe_name(name), value) for name, value in new.items()]
        for start in range(0, max(1, len(items)), _PARAMETERS_PER_REQUEST):
            self._client.log_batch(
                self.run_id,
                params=items[start : start + _PARAMETERS_PER_REQUEST],
                tags=[RunTag(name, value) for name, value in tags.items()],
                synchronous=True,
            )

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        """Send files to the top of the run's artifacts; files that are gone are skipped."""
        for path in paths:
            if path.is_file():
                self._client.log_artifact(self.run_id, str(path))

    def log_metrics(self, lines: Sequence[MetricLine]) -> None:
        """Send lines. Sent again they change nothing: the key is name, step, time and value."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        metrics = [
            Metric(_safe_name(name), value, int(line.time * 1000), line.step)
            for line in lines
            for name, value in line.metrics.items()
        ]
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            batch = metrics[start : start + METRICS_PER_REQUEST]
            try:
                self._client.log_batch(self.run_id, metrics=batch, synchronous=True)
            except MlflowException as error:
                if error.error_code not in _REFUSED:
                    raise
                # Sent again it would be refused again, and hold up all that comes after it.
                self._tell_refusal(f"metrics of steps {lines[0].step} to {lines[-1].step}", error)

    def log_picture(self, name: str, step: int, path: Path) -> None:
        """Show a picture file in MLflow's page at a step; an unreadable one is told and skipped."""
        from PIL import Image

        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError) as error:
            self._tell_refusal(f"picture {path}", error)
            return
        self._client.log_image(
            self.run_id, image, key=_safe_name(name), step=step, synchronous=True
        )

    def finish(self, status: str) -> None:
        """Close the run with FINISHED, KILLED or FAILED."""
        self._client.set_terminated(self.run_id, status=status)

    def _reopen(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if run.info.lifecycle_stage != "active":
            return False
        if run.info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        return True

    def _experiment_id(self, uri: str, experiment: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            try:
                location = _artifact_location(uri, experiment)
                return str(self._client.create_experiment(experiment, location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                # Another job made it a moment ago.
                found = self._client.get_experiment_by_name(experiment)
                assert found is not None
        if found.lifecycle_stage == "deleted":
            _log.info("MLflow experiment %s was in the trash: restored", experiment)
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _tell_refusal(self, what: str, error: Exception) -> None:
        if self._refusals_told == 0:
            _log.warning("MLflow does not take %s: %s (told once)", what, first_line(error))
        self._refusals_told += 1


def _make_client(uri: str) -> Any:
    """Import mlflow (seconds) and make a client with short patience and without chatter."""
    # mlflow's own 7 retries and 120 s hold a call for four minutes when the server is gone.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri[len("sqlite:///") :]).parent.mkdir(parents=True, exist_ok=True)
    # Up to 3.1 the client asks the global address where artifacts go. Setting it also sets the
    # variable, which must not decide where a later run of this process is tracked.
    variable = os.environ.get(_URI_VARIABLE)
    mlflow.set_tracking_uri(uri)
    if variable is None:
        os.environ.pop(_URI_VARIABLE, None)
    else:
        os.environ[_URI_VARIABLE] = variable
    return mlflow.MlflowClient(tracking_uri=uri)


@contextmanager
def _surroundings_left_alone() -> Iterator[None]:
    """While mlflow opens a sqlite file or makes its tables.

    Up to 3.1 its migrations call `logging.config.fileConfig`, which takes the handlers of the root
    logger away and prints every migration, so it is put out of action for that moment; and every
    opening makes an empty ./mlruns.
    """
    original, stray = logging.config.fileConfig, Path("mlruns").absolute()
    had_stray = stray.exists()
    logging.config.fileConfig = lambda *args, **kwargs: None
    try:
        yield
    finally:
        logging.config.fileConfig = original
        if not had_stray:
            with suppress(OSError):
                stray.rmdir()  # only when it is empty


def _artifact_location(uri: str, experiment: str) -> Optional[str]:
    """Beside a sqlite file; without it mlflow would use ./mlruns. A server knows its own place."""
    if not uri.startswith("sqlite:///"):
        return None
    folder = Path(uri[len("sqlite:///") :]).resolve().parent / "mlartifacts" / experiment
    return folder.as_uri()


def _safe_name(name: str) -> str:
    """MLflow takes letters, digits, `_`, `-`, `.`, space and `/`."""
    return re.sub(r"[^\w\-. /]", "_", name)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
