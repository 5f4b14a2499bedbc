"""The benchmark of many clients: seconds of a round and peak memory against their number, for each residency of their states, a process to a case."""
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from contextlib import ExitStack
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import hpcfl
from hpcfl import tree
from hpcfl.algorithms import CONFIGS
from hpcfl.bench.gefl import GeFLNoise
from hpcfl.data.shards import Shard
from hpcfl.errors import EnvironmentFault, JobError
from hpcfl.federation.residency import RESIDENCIES
from hpcfl.runs import launch
from hpcfl.runs.console import Console
from hpcfl.runs.simulation import Simulation
from hpcfl.settings.job import resolve
from hpcfl.wire.communicator import Communicator, require_server
from hpcfl.wire.launchers import OF_THE_JOB

CLIENTS = (10, 100, 1000)
ARCHITECTURES = ("cnn2", "cnn8", "cnn9")                           # 0.16, 0.43 and 0.47 MB
IMAGES, TESTED = 10, 10                                            # of a client, and of the official test set
CHUNK = {"device": 0, "host": 20, "disk": 20}                      # device: the default settings
ROUNDS = 3                                                         # that are timed, after a first one


def clients(comm: Communicator, arguments: Namespace) -> dict[str, Any]:
    """FedAvg of clients with 10 images of 3x32x32 and one of three architectures each, by whole runs with a checkpoint.

    `round_s`: median of the rounds but the first, without evaluation; at the end of the last all clients are evaluated on 10 images. `peak_memory_bytes`:
    resident, of the rank that had most, evaluation and checkpoint included; `before_bytes`: before there are states. `state_bytes`: of all clients.
    Raises: JobError where ranks that were started together are to measure several cases; EnvironmentFault where the process of a case fails.
    """
    cases = list(product(arguments.ranks or (comm.size,), arguments.residency or tuple(RESIDENCIES), arguments.clients or CLIENTS))
    if len(cases) == 1 and cases[0][0] == comm.size:
        return measure_case(comm, arguments, *cases[0][1:])
    if comm.size > 1:
        raise JobError(f"{len(cases)} cases under mpirun, but a peak of memory belongs to a process; give one of --clients and --residency, "
                       f"or leave mpirun out: hpcfl bench clients --ranks {comm.size}")
    return {"rows": [measure_apart(arguments, *case) for case in cases]}


def measure_case(comm: Communicator, arguments: Namespace, residency: str, count: int) -> dict[str, Any]:
    """One case, in this process."""
    repetitions, chunk = arguments.rounds or ROUNDS, CHUNK[residency] if arguments.chunk is None else arguments.chunk
    never = repetitions + 1
    job = resolve({"run": {"name": "clients", "threads": arguments.threads, "device": arguments.device},
                   "data": {"name": "random", "validation_fraction": 0.0, "test_fraction": 0.0}, "models": {"names": list(ARCHITECTURES)},
                   "federation": {"clients": count, "rounds": repetitions + 1}, "residency": {"location": residency, "chunk": chunk},
                   "training": {"batch": IMAGES}, "algorithm": {"name": "fedavg"}, "evaluation": {"every": never, "personal": False},
                   "checkpoint": {"every": never, "seconds": 0.0}}, CONFIGS)
    launch.set_threads(job, comm)
    world = FewImages(job, comm, launch.choose_device(job.run.device, comm.local_rank), IMAGES)
    launch.spare_threads(world)
    with ExitStack() as stack:
        folder = Path(comm.share(stack.enter_context(tempfile.TemporaryDirectory()) if comm.is_server else None))
        simulation, _ = Simulation(world, folder, Console(False, live=False), lambda: False), world.holdings
        before = comm.gather(read_memory("VmRSS"))
        simulation.run()
        peaks, rows = comm.gather(read_memory("VmHWM")), simulation.record.rows
        comm.barrier()                                             # the folder goes when all have written
    if not comm.is_server:
        return {}
    rounds_s = [row["wall_s"] - float(row["seconds"]["evaluate"].max()) for row in rows[1:]]
    states = {name: tree.nbytes(world.problem.structure(name).state_dict()) for name in ARCHITECTURES}
    return {"ranks": comm.size, "residency": residency, "chunk": chunk, "clients": count, "round_s": round(median(rounds_s), 3),
            "peak_memory_bytes": max(require_server(peaks)), "before_bytes": max(require_server(before)),
            "state_bytes": sum(states[name] for name in world.problem.architectures)}


class FewImages(GeFLNoise):
    """Clients with noise to train on, and a few images of it to be tested by."""

    @cached_property
    def test(self) -> Shard:
        """What all clients are tested by."""
        return self.noise(self.clients, TESTED)


def measure_apart(arguments: Namespace, ranks: int, residency: str, count: int) -> dict[str, Any]:
    """One case in processes of its own."""
    chunk = [] if arguments.chunk is None else ["--chunk", str(arguments.chunk)]
    command = [*(["mpirun", "-n", str(ranks)] if ranks > 1 else []), sys.executable, "-m", "hpcfl", "bench", "clients", "--clients", str(count),
               "--residency", residency, *chunk, "--rounds", str(arguments.rounds), "--threads", str(arguments.threads), "--device", arguments.device, "--json"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_JOB)}
    alone["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(hpcfl.__file__).parent.parent), alone.get("PYTHONPATH")]))
    try:
        ended = subprocess.run(command, env=alone, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
                               check=False)
    except OSError as error:
        raise EnvironmentFault(f"{command[0]}: cannot be started ({error.strerror}); take --ranks 1, "
                               "or start one case by the launcher that is there") from error
    if ended.returncode:
        raise EnvironmentFault(f"{' '.join(command)}: ended with exit code {ended.returncode}: {ended.stderr.strip().rpartition(chr(10))[2]}")
    return json.loads(ended.stdout)


def read_memory(name: str) -> int:
    """Bytes of resident memory of this process, by their name in /proc: now (VmRSS) or at most (VmHWM, which unlike getrusage knows nothing of a parent)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return 1024 * int(lines[name].split()[0])
