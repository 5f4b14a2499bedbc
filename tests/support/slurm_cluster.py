"""A SLURM of the tests' own: four nodes on this machine, with daemons, key, ports and folders that no other SLURM shares."""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "mpirun")
NODES = ("n1", "n2", "n3", "n4")
DOWN_AFTER_S = 20                                                  # a node that does not answer so long is down
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
CLEARED_S = 4                                                      # after a requeue, for the processes of the last start to be gone
LIMIT_S = 120                                                      # for what takes seconds
SETTINGS = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
TmpFS={folder}/%n
SlurmdParameters=config_overrides
SlurmdTimeout={down_after}
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2
JobRequeue=1
KillWait=5
MinJobAge=3600
GresTypes=gpu
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    absent = [name for name in PROGRAMS if not _which(name)]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


class Cluster:
    """The running cluster: two nodes in partition main, the default, and two in partition frail, whose nodes may go down."""

    def __init__(self, folder: Path):
        self.folder, self.daemons, self.waiting = folder, dict[str, subprocess.Popen](), dict[str, float]()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_COMM_WORLD", "PMIX_", "PMI_", "SLURM_", "SBATCH_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), inherited["PATH"]])
        self.environment = inherited | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path,
                                        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def begin(self) -> None:
        """Start all daemons and wait for the nodes."""
        ports, folder = _free_ports(1 + len(NODES)), self.folder
        for name in ("munge", "state", *NODES):
            (folder / name).mkdir()
        folder.chmod(0o711)                                        # munge insists that all may reach its socket
        (folder / "munge" / "key").write_bytes(os.urandom(128))
        (folder / "munge" / "key").chmod(0o400)
        lines = [f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:2"
                 for name, port in zip(NODES, ports[1:], strict=True)]
        lines += ["PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4", "PartitionName=frail Nodes=n[3-4] MaxTime=INFINITE"]
        settings = SETTINGS.format(host=socket.gethostname().partition(".")[0], folder=folder, ports=ports, down_after=DOWN_AFTER_S)
        (folder / "slurm.conf").write_text(settings + "\n".join(lines) + "\n")
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")      # any two devices do
        own = (f"--{name}={folder / 'munge' / file}"
               for name, file in (("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("seed-file", "seed"), ("log-file", "log")))
        self._start("munged", "--foreground", "--force", *own)
        self._until(lambda: (folder / "munge" / "socket").exists(), "munged does not begin")
        self._start("slurmctld", "-D")
        for name in NODES:
            self.begin_node(name)
        self._until(lambda: self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == list(NODES), "the nodes do not become idle")

    def end(self) -> None:
        """End all jobs and all daemons, the nodes' first."""
        if self.daemons.get("slurmctld"):
            subprocess.run(["scancel", "--user=root"], env=self.environment, check=False, capture_output=True, timeout=LIMIT_S)
            until = time.monotonic() + 15
            while time.monotonic() < until and subprocess.run(["squeue", "-h"], env=self.environment, check=False, capture_output=True,
                                                                 text=True, timeout=LIMIT_S).stdout:
                time.sleep(0.5)
        for name in reversed(list(self.daemons)):
            self._stop(name, signal.SIGTERM)

    def begin_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._start(name, "-D", "-N", name, program="slurmd")

    def kill_node(self, name: str) -> None:
        """Kill the daemon of a node."""
        self._stop(name, signal.SIGKILL)

    def call(self, *command: object, text: str | None = None, folder: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """What a command prints that must succeed."""
        done = subprocess.run([*map(str, command)], input=text, cwd=folder, env=self.environment | (environment or {}), text=True, check=False,
                              capture_output=True, timeout=LIMIT_S)
        assert done.returncode == 0, f"{command[0]} ends with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, text: str, folder: Path, environment: Mapping[str, str] | None = None) -> str:
        """Submit a script in a folder and return the number of the job."""
        folder.mkdir(parents=True, exist_ok=True)
        return self.call("sbatch", "--parsable", text=text, folder=folder, environment=environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", "-o", number)))

    def reaches(self, number: str, state: str, restarts: int = 0) -> dict[str, str]:
        """Wait until a job is in a state, after so many restarts at least. Nobody waits out the two minutes after which SLURM starts requeued jobs."""
        until = time.monotonic() + LIMIT_S
        while (found := self.job(number))["JobState"] != state or int(found["Restarts"]) < restarts:
            ended = found["JobState"] in ENDS and state in ENDS
            assert not ended and time.monotonic() < until, f"job {number} does not become {state} after {restarts} restarts: {found}"
            self.hasten()
            time.sleep(0.5)
        return found

    def hasten(self) -> None:
        """Let requeued jobs begin; not at once, for SLURM clears away what their last start has left."""
        waiting = {line.split()[0] for line in self.call("squeue", "-h", "-r", "-t", "PENDING", "-o", "%i %r").splitlines() if line.endswith(" BeginTime")}
        self.waiting = {number: self.waiting.get(number, time.monotonic()) for number in waiting}
        for number, since in self.waiting.items():
            if time.monotonic() - since > CLEARED_S:
                self.call("scontrol", "update", f"JobId={number}", "StartTime=now")

    def signal(self, number: str) -> None:
        """What SLURM sends before the time limit, now."""
        self.call("scancel", "--signal=USR1", "--batch", number)

    def processes(self, *words: str) -> list[psutil.Process]:
        """Processes, of this cluster or not, whose command line has one of some words."""
        return [each for each in psutil.process_iter(["cmdline"]) if any(word in " ".join(each.info["cmdline"] or ()) for word in words)]

    def _start(self, name: str, *arguments: object, program: str = "") -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self.daemons[name] = subprocess.Popen([_which(program or name), *map(str, arguments)], env=self.environment, stdin=subprocess.DEVNULL,
                                                  stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _stop(self, name: str, number: int) -> None:
        daemon = self.daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait(timeout=20)

    def _until(self, condition, failure: str) -> None:
        until = time.monotonic() + LIMIT_S
        while not condition():
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            logs = "".join(f"\n-- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))
            assert not ended and time.monotonic() < until, f"{failure}; ended: {ended}{logs}"
            time.sleep(0.2)


@contextmanager
def started() -> Iterator[Cluster]:
    """The cluster, up while the block runs."""
    with tempfile.TemporaryDirectory(prefix="hpcfl-slurm-", dir="/tmp", ignore_cleanup_errors=True) as folder:       # sockets need short paths
        cluster = Cluster(Path(folder))
        try:
            cluster.begin()
            yield cluster
        finally:
            cluster.end()


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
