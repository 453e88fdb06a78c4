"""A real Slurm on this machine, without systemd: munged, slurmctld and a slurmd with "8 GPUs".

The GPUs are links to /dev/null named in gres.conf (Slurm wants devices there); it hands them out
and sets CUDA_VISIBLE_DEVICES as on a GPU node, so that submission, signals and requeueing can be
tested where no GPU is. Slurm believes in 128 CPUs (`config_overrides`), whatever the machine has.
Ports are free ones and files stay in a folder of its own: a Slurm that is installed is not touched.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Optional

DAEMONS = ("munged", "slurmctld", "slurmd")
NUM_GPUS = 8
_FAILURES = {"FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED", "TIMEOUT", "COMPLETED"}

_SLURM_CONF = """\
ClusterName=lgpttest
SlurmctldHost=localhost
SlurmctldAddr=127.0.0.1
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=30
GresTypes=gpu
NodeName=localhost NodeHostname={hostname} NodeAddr=127.0.0.1 \\
    CPUs=128 RealMemory=65536 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> Optional[str]:
    """What keeps a Slurm from being started here; None when nothing does."""
    missing = [name for name in DAEMONS if _find(name) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd needs root"
    return None


class SlurmCluster:
    """Started on entering, stopped on leaving; `run` calls Slurm's commands against it."""

    def __init__(self) -> None:
        # Short: a socket's path may have 107 characters at most, and pytest's folders are long.
        self.folder = Path(tempfile.mkdtemp(prefix="lgpt-slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        try:
            self._write_configs()
            self._start_munge()
            self._start("slurmctld", "-D", "-f", str(self.conf))
            self._start("slurmd", "-D", "-f", str(self.conf), "-N", "localhost")
            self._wait_for_node()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def conf(self) -> Path:
        """slurm.conf."""
        return self.folder / "slurm.conf"

    def run(
        self, *command: str, env: Optional[dict[str, str]] = None, cwd: Optional[Path] = None
    ) -> str:
        """Stdout of a Slurm command (sbatch, squeue, scontrol, scancel)."""
        done = subprocess.run(
            command,
            env={**(os.environ if env is None else env), "SLURM_CONF": str(self.conf)},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job_state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED ..."""
        return self._job_field(job, "JobState")

    def exit_code(self, job: str) -> int:
        """The batch script's exit code."""
        return int(self._job_field(job, "ExitCode").split(":")[0])

    def wait_until(self, job: str, states: set[str], seconds: float) -> str:
        """Wait for one of `states`; a failure shows what the job printed."""
        deadline = time.monotonic() + seconds
        while (state := self.job_state(job)) not in states:
            if time.monotonic() > deadline or state in _FAILURES:
                raise AssertionError(f"job {job} is {state}, not {states}\n{self.output(job)}")
            time.sleep(0.5)
        return state

    def output(self, job: str) -> str:
        """What the job has printed so far."""
        path = Path(self._job_field(job, "StdOut"))
        return path.read_text(errors="replace") if path.exists() else ""

    def stop(self) -> None:
        """Cancel every job, end the daemons, remove the folder."""
        if len(self._daemons) == len(DAEMONS) and self._daemons[1].poll() is None:
            self.run("scancel", "--user=root", "--full", "--signal=KILL")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _job_field(self, job: str, field: str) -> str:
        for word in self.run("scontrol", "show", "job", job).split():
            if word.startswith(f"{field}="):
                return word[len(field) + 1 :]
        raise AssertionError(f"scontrol shows no {field} for job {job}")

    def _write_configs(self) -> None:
        for name in ("state", "spool", "gpus"):
            (self.folder / name).mkdir()
        for number in range(NUM_GPUS):
            (self.folder / "gpus" / f"gpu{number}").symlink_to("/dev/null")
        self.conf.write_text(
            _SLURM_CONF.format(
                folder=self.folder,
                hostname=socket.gethostname().split(".")[0],
                ctld_port=_free_port(),
                slurmd_port=_free_port(),
                gpus=NUM_GPUS,
            )
        )
        (self.folder / "gres.conf").write_text(
            f"NodeName=localhost Name=gpu File={self.folder}/gpus/gpu[0-{NUM_GPUS - 1}]\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        paths = {
            "key-file": key,
            "socket": self.folder / "munge.socket",
            "pid-file": self.folder / "munged.pid",
            "log-file": self.folder / "munged.log",
            "seed-file": self.folder / "munge.seed",
        }
        options = [f"--{name}={path}" for name, path in paths.items()]
        self._start("munged", "--foreground", "--force", *options)
        _wait_for(paths["socket"].exists, "munged's socket", 15)

    def _start(self, name: str, *arguments: str) -> None:
        program = _find(name)
        assert program is not None
        with (self.folder / f"{name}.out").open("wb") as out:
            daemon = subprocess.Popen(
                [program, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "SLURM_CONF": str(self.conf)},
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _wait_for_node(self) -> None:
        def is_idle() -> bool:
            dead = [d.args for d in self._daemons if d.poll() is not None]
            assert not dead, f"ended at once: {dead}\n{self._logs()}"
            seen = subprocess.run(
                ["sinfo", "--noheader", "--format=%T"],
                env={**os.environ, "SLURM_CONF": str(self.conf)},
                capture_output=True,
                text=True,
                check=False,
            )
            return seen.stdout.strip() == "idle"

        try:
            _wait_for(is_idle, "an idle node", 45)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._logs()}") from None

    def _logs(self) -> str:
        paths = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in paths)


def _find(name: str) -> Optional[str]:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(condition: object, what: str, seconds: float) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
