"""Two hosts of the tests' own on this machine: names and networks apart, joined by a cable that can be narrowed, cut and mended; cores and files shared.

A host is a process that holds its namespaces. They have no names that two tests could share, and are gone with that process.
"""
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ADDRESSES = {"near": "10.77.0.1", "far": "10.77.0.2"}               # mpirun is started on the first
PROGRAMS = ("ip", "tc", "unshare", "nsenter", "mpirun")
MADE_S = 10                                                        # within which a host is there
# What mpirun calls instead of ssh: AGENT [OPTION...] ADDRESS WORDS, which a shell there puts together.
AGENT = '#!/bin/sh\nwhile [ "${{1#10.77.}}" = "$1" ]; do shift; done\nshift\nexec {enter} sh -c "$*"\n'


def missing() -> str:
    """Why there can be no two hosts here; empty where there can."""
    if absent := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"{', '.join(absent)} not installed (Debian: apt-get install iproute2 util-linux)"
    if os.geteuid() != 0:
        return "namespaces and their network need root"
    if "Open MPI" not in _call("mpirun", "--version"):
        return "only of Open MPI's mpirun it is known how it starts on another host"
    try:
        with tempfile.TemporaryDirectory() as folder, started(Path(folder)):
            return ""
    except subprocess.CalledProcessError as refused:
        return f"namespaces and a cable between them are not allowed here: {refused.stderr.strip()}"


class Hosts:
    """The two hosts, up."""

    def __init__(self, keepers: Mapping[str, subprocess.Popen], folder: Path):
        self.keepers = keepers
        agent = folder / "agent"
        agent.write_text(AGENT.format(enter=" ".join(self.entering("far"))))
        agent.chmod(0o755)
        self.launcher = (*self.entering("near"), shutil.which("mpirun"), "--host",
                         ",".join(f"{address}:4" for address in ADDRESSES.values()), "--map-by", "node")
        self.environment = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                            **dict.fromkeys(("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"), str(agent)),
                            **dict.fromkeys(("PRTE_MCA_hwloc_default_binding_policy", "OMPI_MCA_hwloc_base_binding_policy"), "none")}

    def entering(self, host: str) -> tuple[str, ...]:
        """The beginning of a command that is to run on a host."""
        return "nsenter", "--target", str(self.keepers[host].pid), "--net", "--uts"

    def narrow(self, rate: str) -> None:
        """Let no more than so much through the cable, each way: "100mbit"."""
        for host in ADDRESSES:
            _call(*self.entering(host), "tc", "qdisc", "replace", "dev", "cable", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "400ms")

    def cut(self) -> None:
        """Cut the cable: what is sent is lost, and nobody is told."""
        _call(*self.entering("far"), "ip", "link", "set", "cable", "down")

    def mend(self) -> None:
        """Mend the cable."""
        _call(*self.entering("far"), "ip", "link", "set", "cable", "up")

    def carried(self) -> tuple[int, int]:
        """Bytes that the cable has carried so far to the far host and back."""
        counts = json.loads(_call(*self.entering("near"), "ip", "-s", "-j", "link", "show", "cable"))[0]["stats64"]
        return counts["tx"]["bytes"], counts["rx"]["bytes"]

    def crash(self) -> None:
        """Kill all that runs on the far host at once."""
        self.clear("far")

    def clear(self, host: str) -> None:
        """Kill all that runs on a host, and wait until it is gone."""
        keeper = self.keepers[host].pid
        here = [process for process in psutil.process_iter() if process.pid != keeper and _network(process.pid) == _network(keeper)]
        for process in here:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(here, MADE_S)


@contextmanager
def started(folder: Path) -> Iterator[Hosts]:
    """Two hosts with a cable between them; whatever runs on them at the end is killed. `folder` takes a small file.

    Raises: CalledProcessError where the system does not allow it.
    """
    keepers = {host: _keeper(host) for host in ADDRESSES}
    hosts = Hosts(keepers, folder)
    try:
        near, far = (str(keeper.pid) for keeper in keepers.values())
        _call("ip", "link", "add", "cable", "netns", near, "type", "veth", "peer", "name", "cable", "netns", far)
        for host, address in ADDRESSES.items():
            _call(*hosts.entering(host), "ip", "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _call(*hosts.entering(host), "ip", "link", "set", device, "up")
        yield hosts
    finally:
        for host, keeper in keepers.items():
            hosts.clear(host)
            keeper.communicate(timeout=MADE_S)                     # the end of its input is its end


def _keeper(host: str) -> subprocess.Popen:
    """The process that holds a host's namespaces, for as long as this one lives."""
    keeper = subprocess.Popen(["unshare", "--net", "--uts", "sh", "-c", f"hostname {host} && echo up && exec cat"], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if not keeper.stdout.readline():
        raise subprocess.CalledProcessError(keeper.wait(MADE_S), keeper.args, stderr=keeper.stderr.read())
    return keeper


def _network(pid: int) -> str | None:
    """Which network a process is in; None where it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None


def _call(*command: str) -> str:
    return subprocess.run(command, text=True, check=True, capture_output=True, timeout=MADE_S).stdout
