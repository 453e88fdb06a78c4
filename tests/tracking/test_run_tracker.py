"""RunTracker against a real server, a hanging one, none at all, and a sqlite file."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from lgpt.core.errors import LgptError
from lgpt.tracking import shipping
from lgpt.tracking.metrics_file import MetricLine, read_metrics
from lgpt.tracking.mlflow_run import MlflowRun, tracking_uri
from lgpt.tracking.run_tracker import RunTracker, replay

pytestmark = [
    pytest.mark.slow,
    # mlflow's imports and stores warn about themselves, each version in its own way.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One runs folder with one mlflow.db: making its tables takes seconds."""
    return tmp_path_factory.mktemp("sqlite") / "runs"


def start(run_folder: Path, uri: str | None = None, **changes: Any) -> RunTracker:
    settings: dict[str, Any] = {
        "experiment": "vqvae-training",
        "run_name": run_folder.name,
        "tags": {"phase": "2", "resolution": "256"},
        "parameters": {"learning_rate": 3e-4, "batch_size": 256},
        "artifacts": [],
        "enabled": True,
        **changes,
    }
    return RunTracker.start(run_folder, uri=uri, **settings)


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def state_of(run_folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run_folder / "mlflow_run.json").read_text())
    return state


def local_uri(run_folder: Path) -> str:
    return tracking_uri(None, run_folder.parent)


def steps_in_mlflow(run_folder: Path, uri: str, metric: str = "loss") -> list[int]:
    history = client_of(uri).get_metric_history(state_of(run_folder)["run_id"], metric)
    return sorted(point.step for point in history)


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_all_of_a_run_arrives_at_a_server(server, tmp_path):
    run_folder = tmp_path / "runs" / "all"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text("phase: 2\n")
    Image.new("RGB", (8, 8), "red").save(run_folder / "grid.png")
    tracker = start(run_folder, server.uri, artifacts=[run_folder / "config.yaml"])
    for step in range(3):
        tracker.log(step, {"loss": 1.0 / (step + 1), "bad:name": math.nan})
    tracker.picture(2, "samples", run_folder / "grid.png")
    tracker.finish("FINISHED", deadline_seconds=60.0)

    client = client_of(server.uri)
    run = client.get_run(state_of(run_folder)["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "all"
    assert client.get_experiment(run.info.experiment_id).name == "vqvae-training"
    assert run.data.params == {"learning_rate": "0.0003", "batch_size": "256"}
    assert {"phase": "2", "resolution": "256"}.items() <= run.data.tags.items()
    assert run.data.metrics["loss"] == pytest.approx(1 / 3)
    assert math.isnan(run.data.metrics["bad_name"])
    history = client.get_metric_history(run.info.run_id, "loss")
    sent = {(point.step, point.timestamp, point.value) for point in history}
    lines = read_metrics(run_folder)
    assert sent == {(line.step, int(line.time * 1000), line.metrics["loss"]) for line in lines}
    assert [entry.path for entry in client.list_artifacts(run.info.run_id)] == [
        "config.yaml",
        "images",
    ]
    images = [entry.path for entry in client.list_artifacts(run.info.run_id, "images")]
    assert any(path.startswith("images/samples") and path.endswith(".png") for path in images)


def test_a_hanging_server_holds_nothing_up_and_gets_the_rest_later(server, tmp_path, caplog):
    run_folder = tmp_path / "runs" / "hung"
    tracker = start(run_folder, server.uri)
    tracker.log(0, {"loss": 1.0})
    wait_for(lambda: (state_of(run_folder)["shipped_bytes"]) > 0)
    with server.hanging():
        # That these lines are passed while the server is stopped is the proof that nothing waits.
        for step in range(1, 2001):
            tracker.log(step, {"loss": 1.0 / step})
        tracker.finish("KILLED", deadline_seconds=1.0)
        assert f"lgpt mlflow sync {run_folder}" in caplog.text
        assert [line.step for line in read_metrics(run_folder)] == list(range(2001))
    assert replay(run_folder) == state_of(run_folder)["run_id"]
    assert steps_in_mlflow(run_folder, server.uri) == list(range(2001))
    assert client_of(server.uri).get_run(replay(run_folder)).info.status == "KILLED"


def test_without_a_server_training_goes_on_and_a_later_start_sends_all(
    server, refusing_uri, tmp_path, caplog
):
    run_folder = tmp_path / "runs" / "refused"
    tracker = start(run_folder, refusing_uri)
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    wait_for(lambda: "training goes on, metrics are kept in" in caplog.text)
    tracker.finish("FAILED", deadline_seconds=20.0)
    assert caplog.text.count("training goes on") == 1
    with pytest.raises(LgptError, match=f"{refusing_uri} does not take the metrics"):
        replay(run_folder)

    again = start(run_folder, server.uri)
    again.log(3, {"loss": 0.5})
    again.finish("FINISHED", deadline_seconds=60.0)
    assert steps_in_mlflow(run_folder, server.uri) == [0, 1, 2, 3]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_and_in_one_truth(
    runs, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    run_folder = runs / "local"
    first = start(run_folder)
    for step in range(1, 6):
        first.log(step, {"loss": 1.0})
    first.finish("KILLED", deadline_seconds=60.0)
    run_id = state_of(run_folder)["run_id"]

    second = start(run_folder, parameters={"learning_rate": 1e-4, "batch_size": 256, "new": 1})
    second.truncate_after(3)
    for step in (4, 5, 6):
        second.log(step, {"loss": 2.0})
    second.finish("FINISHED", deadline_seconds=60.0)
    second.finish("FAILED")  # an error handler further out: the first word stands

    assert state_of(run_folder)["run_id"] == run_id
    assert [line.step for line in read_metrics(run_folder)] == [1, 2, 3, 4, 5, 6]
    assert [line.metrics["loss"] for line in read_metrics(run_folder)] == [1, 1, 1, 2, 2, 2]
    assert steps_in_mlflow(run_folder, local_uri(run_folder)) == [1, 2, 3, 4, 4, 5, 5, 6]
    run = client_of(local_uri(run_folder)).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"learning_rate": "0.0003", "batch_size": "256", "new": "1"}
    assert "learning_rate 0.0003 -> 0.0001" in caplog.text
    assert run.info.artifact_uri.startswith((runs / "mlartifacts").as_uri())
    assert list(tmp_path.iterdir()) == [], "mlflow left something in the cwd"


def test_what_mlflow_refuses_is_told_and_does_not_hold_up_the_rest(runs, caplog):
    run_folder = runs / "refusal"
    tracker = start(run_folder)
    tracker.log(1, {"n" * 300: 1.0})
    tracker.picture(1, "samples", run_folder / "no_such.png")
    wait_for(lambda: state_of(run_folder)["shipped_bytes"] > 0)
    tracker.log(2, {"loss": 1.0})
    tracker.finish("FINISHED", deadline_seconds=60.0)
    assert "MLflow does not take metrics of steps 1 to 1" in caplog.text
    assert steps_in_mlflow(run_folder, local_uri(run_folder)) == [2]


def test_a_run_deleted_in_mlflow_is_made_anew_with_all_lines(runs):
    run_folder = runs / "deleted"
    first = start(run_folder)
    first.log(1, {"loss": 1.0})
    first.finish("KILLED", deadline_seconds=60.0)
    old = state_of(run_folder)["run_id"]
    client_of(local_uri(run_folder)).delete_run(old)

    second = start(run_folder)
    second.log(2, {"loss": 1.0})
    second.finish("FINISHED", deadline_seconds=60.0)
    assert state_of(run_folder)["run_id"] != old
    assert steps_in_mlflow(run_folder, local_uri(run_folder)) == [1, 2]


def test_a_damaged_state_file_costs_only_the_old_mlflow_run(runs, caplog):
    run_folder = runs / "damaged"
    run_folder.mkdir(parents=True)
    (run_folder / "mlflow_run.json").write_text('{"uri": "x"')
    tracker = start(run_folder)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED", deadline_seconds=60.0)
    assert "mlflow_run.json is damaged" in caplog.text
    assert steps_in_mlflow(run_folder, local_uri(run_folder)) == [1]


def test_tracking_switched_off_still_writes_metrics(tmp_path):
    run_folder = tmp_path / "runs" / "off"
    tracker = start(run_folder, enabled=False)
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 1.0})
    tracker.picture(2, "samples", tmp_path / "any.png")
    tracker.truncate_after(1)
    tracker.finish("FINISHED")
    assert [line.step for line in read_metrics(run_folder)] == [1]
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["off", "metrics.jsonl"]


class MlflowWithAClosedStore(MlflowRun):
    """Stands for MlflowRun: metrics arrive, the configs and one picture never do."""

    sent: ClassVar[list[Any]] = []
    tries = 0

    def __init__(self, uri: str, experiment: str, run_name: str, run_id: str | None) -> None:
        self.is_new, self.run_id = run_id is None, run_id or "r1"

    def describe(self, tags: Any, parameters: Any) -> None:
        pass

    def log_metrics(self, lines: list[MetricLine]) -> None:
        self.sent.extend(line.step for line in lines)

    def log_artifacts(self, paths: list[Path]) -> None:
        raise PermissionError("[Errno 13] /srv/mlartifacts")

    def log_picture(self, name: str, step: int, path: Path) -> None:
        if name == "refused":
            type(self).tries += 1
            raise PermissionError("[Errno 13] /srv/mlartifacts")
        self.sent.append(name)

    def finish(self, status: str) -> None:
        self.sent.append(status)


def test_an_artifact_store_that_is_closed_holds_up_no_metrics_pictures_or_end(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(shipping, "MlflowRun", MlflowWithAClosedStore)
    monkeypatch.setattr(shipping, "_PAUSE_SECONDS", 0.001)
    run_folder, sent = tmp_path / "runs" / "closed", MlflowWithAClosedStore.sent
    tracker = start(run_folder, "http://store", artifacts=[tmp_path / "config.yaml"])
    tracker.picture(1, "refused", tmp_path / "a.png")
    tracker.picture(1, "samples", tmp_path / "b.png")
    for step in range(1, 7):
        tracker.log(step, {"loss": 1.0})
        wait_for(lambda step=step: step in sent)
    tracker.finish("FINISHED", deadline_seconds=10.0)
    assert [each for each in sent if each not in ("samples", "FINISHED")] == [1, 2, 3, 4, 5, 6]
    assert sent.count("samples") == 1
    assert sent[-1] == "FINISHED"
    assert MlflowWithAClosedStore.tries == 3
    assert caplog.text.count("MLflow takes the metrics") == 1
    assert [name for name, *_ in state_of(run_folder)["pictures"]] == ["refused"], "kept for a sync"


def test_a_full_disk_ends_no_run_not_even_at_its_finish(tmp_path, caplog):
    tracker = start(tmp_path / "runs" / "full", enabled=False)
    tracker._metrics_file._stream.close()
    tracker._metrics_file._stream = Path("/dev/full").open("wb")  # noqa: SIM115
    tracker.log(1, {"loss": 1.0})
    tracker.finish("KILLED")
    assert caplog.text.count("No space left") == 2


def test_replaying_a_folder_that_is_no_tracked_run_says_what_to_give(tmp_path):
    with pytest.raises(LgptError, match=r"holds no mlflow_run\.json"):
        replay(tmp_path)


def test_the_uri_is_the_configs_then_the_environments_then_beside_the_runs(tmp_path, monkeypatch):
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from.environment")
    assert tracking_uri(None, tmp_path) == "http://from.environment"
    assert tracking_uri("http://from.config", tmp_path) == "http://from.config"
