"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=10
SchedulerParameters=sched_interval=1,sched_min_interval=100000
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_requirement() -> str | None:
    """Return the reason why no cluster can start here, or None."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    programs = ("munged", "slurmctld", "slurmd", "srun")
    absent = [program for program in programs if shutil.which(program) is None]
    return (
        f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)" if absent else None
    )


class SlurmCluster:
    """Nodes n0 and n1 of four CPUs each.

    Args:
        folder: folder for state and logs, readable by all users.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        ports = [_free_port() for _ in range(3)]
        text = _CONFIGURATION.format(host=socket.gethostname(), ports=ports, folder=folder)
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise

    def _start_all(self) -> None:
        folder = self.folder
        self._start_munge()
        self._start("slurmctld", "-D", "-c")
        for node in ("n0", "n1"):
            self._start("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 30
        while self.run("sinfo", "-h", "-o", "%T %D").strip() != "idle 2":
            if time.monotonic() > deadline:
                logs = "".join(path.read_text()[-3000:] for path in folder.glob("*.log"))
                raise RuntimeError(f"the cluster did not start:\n{logs}")
            time.sleep(0.1)

    def run(self, *command: str, timeout: float = 60, check: bool = False) -> str:
        """Return the output of a command of SLURM, standard error included."""
        done = subprocess.run(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def close(self) -> None:
        """Cancel all jobs and end the daemons."""
        self.run("scancel", "--full", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *command: str) -> None:
        nothing = subprocess.DEVNULL
        with (self.folder / f"{command[0]}.stderr.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdin=nothing, stdout=nothing, stderr=log
                )
            )

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        files = ("--key-file", "key"), ("--socket", "socket"), ("--log-file", "log")
        options = [f"{name}={munge / file}" for name, file in (*files, ("--pid-file", "pid"))]
        # --force: the folders above may be writable by their group.
        seed = f"--seed-file={munge / 'seed'}"
        self._start("munged", "--foreground", "--force", *options, seed)
        deadline = time.monotonic() + 10
        while not (munge / "socket").exists():
            assert time.monotonic() < deadline, (munge / "log").read_text()
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
