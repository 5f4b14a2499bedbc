"""Two ranks on two hosts with a cable between them: the bits of one host, no more bytes than a round needs.

And what becomes of a run whose cable or host fails.
"""
import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
import pytest

from hpcfl.runs import slurm
from hpcfl.settings.job import Job
from tests.support import hosts
from tests.support.hosts import Hosts
from tests.support.tiny_runs import Started, apart, carry_out, deterministic, outcome, started, tiny, write_job

LIMIT_S = 3                                                        # timeouts.collective
PACED = """
import time
from hpcfl.runs.simulation import Simulation
finish = Simulation._finish_round

def finish_in_time(self, place):
    time.sleep(0.2)
    finish(self, place)
Simulation._finish_round = finish_in_time
"""
COUNTED = """
from hpcfl.runs.simulation import Simulation
finish = Simulation._finish_round

def finish_and_count(self, place):
    finish(self, place)
    if self.comm.is_server:
        with open("carried", "a") as file, open("/proc/self/net/dev") as network:
            received, *_, sent = next(line for line in network if "cable" in line).partition(":")[2].split()[:9]
            print(sent, received, file=file)
Simulation._finish_round = finish_and_count
"""


@pytest.fixture
def pair(tmp_path) -> Iterator[Hosts]:
    if reason := hosts.missing():
        pytest.skip(reason)
    with hosts.started(tmp_path) as both:
        yield both


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Job, Path, Path]:
    """A job of ten rounds that waits for LIMIT_S, its file, and its run on one host and one rank."""
    job = deterministic(tiny("fedavg", federation={"participation": 1.0, "rounds": 10}, checkpoint={"every": 1}, timeouts={"collective": LIMIT_S}))
    folder = tmp_path_factory.mktemp("whole")
    return job, write_job(folder, job), carry_out(job, folder / "run")


def begun(pair: Hosts, path: Path, folder: Path, *settings: object, fault: str = "") -> AbstractContextManager[Started]:
    """The job on two hosts, a rank on each."""
    return started(folder, "run", path, *settings, "--out", folder / "run", ranks=2, fault=fault, environment=pair.environment, launcher=pair.launcher)


def goes_on(pair: Hosts, whole: tuple[Job, Path, Path], folder: Path) -> None:
    """Whether the same command goes on from the last checkpoint and comes to the bits of one host."""
    with begun(pair, whole[1], folder) as job:
        assert job.ends() == 0, job.text()
        assert "resumed after round " in job.text()
    assert (folder / "run" / "STATUS").read_text() == "done\n" and not apart(outcome(folder / "run"), outcome(whole[2]))


def waits_for(condition, job: subprocess.Popen) -> None:
    """Wait until something is so while a job is at work."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until and job.poll() is None, f"exit code {job.poll()}"
        time.sleep(0.05)


def test_two_hosts_give_the_bits_of_one(pair, whole, tmp_path):
    with begun(pair, whole[1], tmp_path) as job:
        assert job.ends() == 0, job.text()
    ranks = json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"]
    assert [each["host"] for each in ranks] == ["near", "far"] and not apart(outcome(tmp_path / "run"), outcome(whole[2]))


def test_a_round_carries_a_model_each_way_and_little_else(pair, tmp_path):
    """The network of the benchmark w1, with a batch for each of its ten clients."""
    job = tiny("fedavg", data={"name": "random", "fraction": 0.1, "partition": "iid", "minimum": 1, "public_fraction": 0.0,
                               "validation_fraction": 0.0, "test_fraction": 0.0},
               models={"names": ["w1"], "feature_size": 512}, federation={"clients": 10, "participation": 1.0, "rounds": 5}, training={"batch": 10},
               evaluation={"every": 99})
    with begun(pair, write_job(tmp_path, job), tmp_path, fault=COUNTED) as process:
        assert process.ends() == 0, process.text()
    model_bytes = 4 * int(outcome(tmp_path / "run").metrics["clients/parameters"][0])
    counts = [tuple(map(int, line.split())) for line in (tmp_path / "carried").read_text().splitlines()[:-1]]        # the last round evaluates
    there, back = (median(after[way] - before[way] for before, after in pairwise(counts)) / model_bytes for way in (0, 1))
    assert model_bytes == 4 * 878_538 and 1 <= there <= 1.1 and 1 <= back <= 1.1, f"{there:.3f} models there, {back:.3f} back"


def test_a_cable_that_is_mended_in_time_costs_nothing_but_time(pair, whole, tmp_path):
    with begun(pair, whole[1], tmp_path, "--set", "timeouts.collective=30", fault=PACED) as job:
        job.reaches("run/LATEST")
        pair.cut()
        time.sleep(2)
        assert (tmp_path / "run" / "LATEST").read_text() < "round-000010"
        pair.mend()
        assert job.ends() == 0, job.text()
    assert not apart(outcome(tmp_path / "run"), outcome(whole[2]))


def test_a_cable_that_stays_cut_ends_the_run_and_the_batch_script_ends_the_launcher(pair, whole, tmp_path):
    """mpirun waits for a daemon that it cannot reach; the script, under bash with stand-ins for SLURM, does not."""
    script = slurm.write_script(whole[1], "it", slurm.Request(nodes=2), out=tmp_path / "run").replace("pause=10 ", "pause=0.2 ")
    for name, text in (("mpirun", f'#!/bin/bash\nunset ${{!SLURM_*}}\nexec {shlex.join(pair.launcher)} "$@"\n'),
                       ("scontrol", '#!/bin/bash\necho "$*" >requeued\n'),
                       ("script", script), ("sitecustomize.py", PACED)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    before = {name: os.pathsep.join([str(tmp_path), os.environ.get(name, "")]) for name in ("PATH", "PYTHONPATH")}
    with (tmp_path / "output").open("w") as output:
        job = subprocess.Popen(["bash", "script"], env=os.environ | pair.environment | before | {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "2"}, cwd=tmp_path,
                               stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        waits_for((tmp_path / "run" / "LATEST").exists, job)
        pair.cut()
        code = job.wait(timeout=60)
    finally:
        job.kill()
    text, status = " ".join((tmp_path / "output").read_text().split()), (tmp_path / "run" / "STATUS").read_text()
    assert status.startswith(f"failed: timeouts.collective = {LIMIT_S} s is over: no rank is missing: "
                             "they made the same calls, and a message between the hosts "
                             "near (rank 0) and far (rank 1) does not arrive: see to the network between them. Ranks 0 to 1 wait in "), status
    assert "Errorcode: 7" in text and "the run has ended and its launcher has not, so it was killed" in text, text
    assert code == 75 and (tmp_path / "requeued").read_text() == "requeue 17\n", "there is a checkpoint, from which it goes on elsewhere"
    pair.clear("far")
    pair.mend()
    goes_on(pair, whole, tmp_path)


def test_the_run_of_a_host_that_crashed_is_not_at_work_and_goes_on(pair, whole, tmp_path):
    with begun(pair, whole[1], tmp_path, fault=PACED) as job:
        job.reaches("run/LATEST")
        pair.crash()
        job.ends()                                                 # with 0, for Open MPI
    held = json.loads((tmp_path / "run" / "LOCK").read_text())
    assert held["host"] == "near" and not psutil.pid_exists(held["pid"]) and (tmp_path / "run" / "STATUS").read_text() == "running\n"
    goes_on(pair, whole, tmp_path)
