"""Benchmarks: the real loop and the real steps on fixed workloads; figures with their units in the key."""
import time
from argparse import Namespace
from statistics import median

import psutil
import torch

from hpcfl import launch
from hpcfl.algorithms import CONFIGS
from hpcfl.comm import Communicator
from hpcfl.federation import begin, rounds
from hpcfl.job import resolve
from hpcfl.ledger import Ledger
from hpcfl.world import World


def w1(comm: Communicator, arguments: Namespace) -> dict[str, float]:
    """FedAvg of ten clients with 100 images of 3x32x32 each, a CNN of 878,538 parameters, batch 10, one epoch of SGD."""
    job = resolve({"run": {"name": "w1", "threads": arguments.threads, "device": arguments.device},
                   "data": {"name": "random", "validation": 0.0, "test": 0.0}, "models": {"names": ["w1"], "features": 512},
                   "federation": {"clients": 10, "rounds": arguments.rounds + 1}, "training": {"batch": 10, "lr": 0.01},
                   "algorithm": {"name": "fedavg"}}, CONFIGS)
    launch.set_threads(job, comm)
    device = launch.choose_device(job.run.device, comm.local_rank)
    world, laps = World(job, comm, device), []
    state, ledger = begin(world), Ledger(device)
    startup = time.time() - psutil.Process().create_time()
    comm.barrier()
    start = time.perf_counter()
    for _ in rounds(world, state, ledger, lambda state, place: None):
        comm.barrier()
        laps.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {"ranks": comm.size, "threads": torch.get_num_threads(), "device": str(device), "startup_s": round(startup, 3),
            "first_round_s": round(laps[0], 4), "round_s": round(median(laps[1:]), 4)}


BENCHES = {"w1": w1}
