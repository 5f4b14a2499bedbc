"""The benchmark of the whole loop: rounds of FedAvg on a fixed workload, W1."""
import time
from argparse import Namespace
from typing import Any

import psutil
import torch

from hpcfl.bench.timing import median_seconds
from hpcfl.federation.exchange import Exchange
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.loop import rounds
from hpcfl.federation.state import begin
from hpcfl.federation.world import World
from hpcfl.runs import devices
from hpcfl.runs.choices import CHOICES
from hpcfl.settings.job import resolve
from hpcfl.wire.communicator import Communicator, connect

ROUNDS = 15                                                        # that are timed, after a first one


def w1(comm: Communicator, arguments: Namespace) -> dict[str, Any]:
    """FedAvg of ten clients with 100 images of 3x32x32 each, a CNN of 878,538 parameters, batch 10, one epoch of SGD.

    `startup_s`: from the start of the process to the first round. `round_s`: median of the rounds but the first.
    """
    comm = connect(deterministic=True) if arguments.deterministic else comm
    job = resolve({"run": {"name": "w1", "threads": arguments.threads, "device": arguments.device, "deterministic": arguments.deterministic},
                   "data": {"name": "random", "validation_fraction": 0.0, "test_fraction": 0.0}, "models": {"names": ["w1"], "feature_size": 512},
                   "federation": {"clients": 10, "rounds": (arguments.rounds or ROUNDS) + 1}, "training": {"batch": 10, "lr": 0.01},
                   "algorithm": {"name": "fedavg"}}, CHOICES)
    devices.set_threads(job, comm)
    device = devices.choose_device(job.run.device, comm.local_rank)
    world, laps = World(job, comm, device), []
    devices.spare_threads(world)
    state, ledger = begin(world), Ledger(device)
    startup = time.time() - psutil.Process().create_time()
    comm.barrier()
    start = time.perf_counter()
    for _ in rounds(Exchange(world, ledger, lambda state, place: None), state):
        comm.barrier()
        laps.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {"ranks": comm.size, "threads": torch.get_num_threads(), "device": str(device), "startup_s": round(startup, 3),
            "first_round_s": round(laps[0], 4), "round_s": median_seconds(laps[1:])}
