"""train.sbatch on a real Slurm, with a small script in place of DeepSpeed.

Devices, signals, requeueing and exit codes; test_slurm_training.py trains for real.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.sbatch"

# `lgpt config show CONFIG ... --json`, which train.sbatch asks for the run folder.
LGPT = """#!/usr/bin/env bash
[ "$3" != wrong.yaml ] || { echo "lgpt: ten problems" >&2; exit 2; }
echo "name: try"; echo '{"run_folder": "runs/try"}'
"""
# A launcher that writes down what it was given and starts one rank, which does what RANK_DOES says.
# Like DeepSpeed's, the launcher has no handler for USR1.
DEEPSPEED = r"""#!/usr/bin/env python3
import json, os, subprocess, sys
seen = {k: os.environ.get(k) for k in ("TORCH_EXTENSIONS_DIR", "MLFLOW_TRACKING_URI")}
with open("seen.jsonl", "a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], **seen}) + "\n")
code = subprocess.run([sys.executable, os.environ["RANK_SCRIPT"]]).returncode
sys.exit(code)
"""
RANK = r"""
import os, pathlib, signal, sys, time
run = pathlib.Path("runs/try"); (run / "checkpoints").mkdir(parents=True, exist_ok=True)
latest = run / "checkpoints/latest"
does = os.environ["RANK_DOES"]
if does == "vanish":
    sys.exit(0)
if does == "save nothing":
    sys.exit(75)
if does == "fail":
    sys.exit(4)
if does == "train" or latest.exists():
    time.sleep(float(os.environ.get("RANK_SECONDS", "0")))
    (run / "DONE").write_text("{}")
    sys.exit(0)
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
pathlib.Path("rank_is_ready").touch()
while not told:
    time.sleep(0.1)
latest.write_text("step_7")
sys.exit(75)
"""


class Site:
    """A folder to submit from, whose PATH has the two stand-ins."""

    def __init__(self, folder: Path, slurm: SlurmCluster) -> None:
        self.folder, self.slurm = folder, slurm
        (folder / "bin").mkdir()
        for name, text in (("lgpt", LGPT), ("deepspeed", DEEPSPEED)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        (folder / "rank.py").write_text(RANK)

    def submit(self, *words: str, does: str, seconds: float = 0) -> str:
        env = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "RANK_SCRIPT": str(self.folder / "rank.py"),
            "RANK_DOES": does,
            "RANK_SECONDS": str(seconds),
        }
        options = [word for word in words if word.startswith("--")]
        config = [word for word in words if not word.startswith("--")]
        command = ["sbatch", "--parsable", *options, str(SCRIPT), *config]
        return self.slurm.run(*command, env=env, cwd=self.folder)

    def seen(self) -> list[dict[str, object]]:
        lines = (self.folder / "seen.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def wait_for_rank(self) -> None:
        deadline = time.monotonic() + 30
        while not (self.folder / "rank_is_ready").exists():
            assert time.monotonic() < deadline, "the rank did not start"
            time.sleep(0.1)


@pytest.fixture
def site(tmp_path: Path, slurm: SlurmCluster) -> Site:
    return Site(tmp_path, slurm)


def test_devices_port_and_settings_reach_the_launcher(site: Site):
    (site.folder / "runs").mkdir()
    (site.folder / "runs" / "mlflow_server.uri").write_text("http://somewhere:5000\n")
    job = site.submit("--gres=gpu:2", "c.yaml", "name=two words", does="train")
    site.slurm.wait_until(job, {"COMPLETED"}, 30)
    (seen,) = site.seen()
    port = str(10000 + int(job) % 20000)
    assert seen["argv"] == [
        *("--num_gpus", "2", "--master_port", port, "--module", "lgpt", "train"),
        *("c.yaml", "name=two words"),
    ]
    assert seen["MLFLOW_TRACKING_URI"] == "http://somewhere:5000"
    assert job in str(seen["TORCH_EXTENSIONS_DIR"])
    assert not Path(str(seen["TORCH_EXTENSIONS_DIR"])).parent.exists()


def test_the_second_job_on_a_node_keeps_off_the_devices_of_the_first(site: Site):
    first = site.submit("--gres=gpu:6", "c.yaml", does="train", seconds=6)
    site.slurm.wait_until(first, {"RUNNING"}, 30)
    second = site.submit("--gres=gpu:2", "c.yaml", does="train")
    site.slurm.wait_until(second, {"COMPLETED"}, 30)
    argvs = [seen["argv"] for seen in site.seen()]
    assert ["--include", "localhost:6,7"] in [argv[:2] for argv in argvs if isinstance(argv, list)]
    site.slurm.wait_until(first, {"COMPLETED"}, 30)


def test_usr1_saves_requeues_and_the_second_start_ends_the_run(site: Site):
    job = site.submit("c.yaml", does="wait for a signal")
    site.wait_for_rank()
    site.slurm.run("scancel", "--batch", "--signal=USR1", job)
    site.slurm.wait_until(job, {"PENDING"}, 30)
    # Slurm makes a requeued job wait for two minutes. Two seconds are the least: slurmd keeps to
    # whole seconds what it revoked, and refuses a start within the second of the requeue.
    site.slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")
    site.slurm.wait_until(job, {"COMPLETED"}, 40)
    assert "Restarts=1" in site.slurm.run("scontrol", "show", "job", job)
    output = site.slurm.output(job)
    assert "checkpoint step_7 saved; back into the queue" in output
    assert "start 2] done: runs/try" in output


def test_usr2_saves_and_ends_without_requeueing(site: Site):
    job = site.submit("c.yaml", does="wait for a signal")
    site.wait_for_rank()
    site.slurm.run("scancel", "--batch", "--signal=USR2", job)
    site.slurm.wait_until(job, {"COMPLETED"}, 30)
    assert "stopped, checkpoint step_7 saved" in site.slurm.output(job)


@pytest.mark.parametrize(
    ("config", "does", "code", "says"),
    [
        ("wrong.yaml", "train", 2, "lgpt: ten problems"),
        ("c.yaml", "fail", 4, "failed with exit code 4"),
        ("c.yaml", "vanish", 1, "there is no runs/try/DONE"),
        ("c.yaml", "save nothing", 75, "stopped without a new checkpoint (newest: none)"),
    ],
)
def test_a_failure_ends_the_job_with_its_code(
    site: Site, config: str, does: str, code: int, says: str
):
    job = site.submit(config, does=does)
    site.slurm.wait_until(job, {"FAILED"}, 30)
    assert site.slurm.exit_code(job) == code
    assert says in site.slurm.output(job)


def test_a_job_without_gpus_says_how_to_ask_for_them(site: Site):
    job = site.submit("--gres=none", "c.yaml", does="train")
    site.slurm.wait_until(job, {"FAILED"}, 30)
    assert "the job has no GPU: sbatch --gres=gpu:8" in site.slurm.output(job)
