"""The two jobs of launch/ together: an MLflow server, and eight ranks that train and log to it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LAUNCH = Path(__file__).resolve().parents[2] / "launch"
RANKS = 8
STEPS = 3

TINY_RUN: dict[str, Any] = {
    "phase": 2,
    "name": "eight-ranks",
    "data": {
        "dataset": "shapes",
        "resolution": 16,
        "workers": 0,
        "shapes": {"train_images": 32, "val_images": 8},
    },
    "batch": {"global_batch_images": RANKS, "micro_batch_images": 1},
    "schedule": {"warmup_steps": 1},
    "training": {
        "max_steps": STEPS,
        "precision": "fp32",
        "log_every": 1,
        "validation_images": 8,
        "sample_every": 0,
    },
    "vqvae": {
        "codebook_size": 16,
        "code_dim": 4,
        "z_channels": 32,
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "resolution": 16,
    },
}


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def post(uri: str, call: str, body: dict[str, Any]) -> dict[str, Any]:
    """One call of MLflow's REST interface: another way in than the client that logged."""
    request = Request(
        f"{uri}/api/2.0/mlflow/{call}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def wait_for_uri(slurm: SlurmCluster, job: str, uri_file: Path) -> str:
    deadline = time.monotonic() + 180
    while not uri_file.exists():
        assert slurm.job_state(job) in {"PENDING", "RUNNING"}, slurm.output(job)
        assert time.monotonic() < deadline, slurm.output(job)
        time.sleep(0.5)
    return uri_file.read_text().strip()


def test_eight_ranks_train_to_the_end_and_log_to_the_server_of_another_job(
    slurm: SlurmCluster, tmp_path: Path
):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_RUN))

    def submit(script: str, *words: str) -> str:
        command = ("sbatch", "--parsable", str(LAUNCH / script), *words)
        return slurm.run(*command, env=environment(), cwd=tmp_path)

    server = submit("mlflow_server.sbatch")
    uri_file = tmp_path / "runs" / "mlflow_server.uri"
    uri = wait_for_uri(slurm, server, uri_file)
    job = submit("train.sbatch", "tiny.yaml")
    slurm.wait_until(job, {"RUNNING"}, 60)
    slurm.wait_until(job, {"COMPLETED"}, 600)

    run_folder = tmp_path / "runs" / "eight-ranks"
    assert json.loads((run_folder / "DONE").read_text())["step"] == STEPS
    assert json.loads((run_folder / "ds_config.json").read_text())["train_batch_size"] == RANKS
    experiments = post(uri, "experiments/search", {"max_results": 10})["experiments"]
    (experiment,) = [e for e in experiments if e["name"] == "vqvae-training"]
    search = {"experiment_ids": [experiment["experiment_id"]], "max_results": 10}
    (logged,) = post(uri, "runs/search", search)["runs"]
    assert logged["info"]["run_name"] == "eight-ranks"
    assert logged["info"]["status"] == "FINISHED"
    written: dict[str, tuple[int, float]] = {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        record.pop("time")
        written.update({key: (step, float(value)) for key, value in record.items()})
    assert STEPS in {step for step, _ in written.values()}
    arrived = {m["key"]: (int(m["step"]), m["value"]) for m in logged["data"]["metrics"]}
    assert {k: arrived.get(k) for k in written} == written

    slurm.run("scancel", server)
    slurm.wait_until(server, {"CANCELLED", "COMPLETED"}, 60)
    assert not uri_file.exists(), "a server that is gone must not be found by the next job"
