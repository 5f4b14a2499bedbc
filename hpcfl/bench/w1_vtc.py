"""Benchmarks: the real loop and the real steps on fixed workloads; figures with their units in the key."""
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch

from hpcfl.algorithms import CONFIGS
from hpcfl.algorithms.fedvtc import FedVTC
from hpcfl.bench.clients import clients
from hpcfl.bench.fedconv import fedconv
from hpcfl.bench.gefl import gefl
from hpcfl.contract import ClientSite, ServerSite
from hpcfl.federation.exchange import Exchange
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.loop import rounds
from hpcfl.federation.state import begin
from hpcfl.federation.world import World
from hpcfl.runs import launch
from hpcfl.settings.job import Job, resolve
from hpcfl.training.group import Group
from hpcfl.training.losses import cross_entropy
from hpcfl.wire.communicator import Alone, Communicator, connect, require_server
from hpcfl.wording import align_rows


def w1(comm: Communicator, arguments: Namespace) -> dict[str, float]:
    """FedAvg of ten clients with 100 images of 3x32x32 each, a CNN of 878,538 parameters, batch 10, one epoch of SGD."""
    comm = connect(deterministic=True) if arguments.deterministic else comm
    job = resolve({"run": {"name": "w1", "threads": arguments.threads, "device": arguments.device, "deterministic": arguments.deterministic},
                   "data": {"name": "random", "validation_fraction": 0.0, "test_fraction": 0.0}, "models": {"names": ["w1"], "feature_size": 512},
                   "federation": {"clients": 10, "rounds": (arguments.rounds or ROUNDS) + 1}, "training": {"batch": 10, "lr": 0.01},
                   "algorithm": {"name": "fedavg"}}, CONFIGS)
    launch.set_threads(job, comm)
    device = launch.choose_device(job.run.device, comm.local_rank)
    world, laps = World(job, comm, device), []
    launch.spare_threads(world)
    state, ledger = begin(world), Ledger(device)
    startup = time.time() - psutil.Process().create_time()
    comm.barrier()
    start = time.perf_counter()
    for _ in rounds(Exchange(world, ledger, lambda state, place: None), state):
        comm.barrier()
        laps.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {"ranks": comm.size, "threads": torch.get_num_threads(), "device": str(device), "startup_s": round(startup, 3),
            "first_round_s": round(laps[0], 4), "round_s": round(median(laps[1:]), 4)}


def vtc(comm: Communicator, arguments: Namespace) -> dict[str, Any]:
    """Steps of FedVTC's generator (p = 64, 1x28x28) and of a small classifier by `fit`: four clients, batch 64, one after the other and together.

    Eager, and compiled too on CUDA or where asked. `step_s` is the time of one client's step, its batch included; every rank measures for itself.
    """
    device = launch.choose_device(arguments.device, comm.local_rank)
    steps = arguments.steps or FEW_STEPS[device.type]
    job = resolve({"run": {"name": "vtc", "threads": arguments.threads},
                   "data": {"fraction": IMAGES / 1437, "image_size": 28, "validation_fraction": 0.0, "test_fraction": 0.0}, "models": {"feature_size": 64},
                   "federation": {"clients": CLIENTS}, "training": {"batch": 64, "epochs": -(-steps // PASS)},
                   "algorithm": {"name": "fedvtc", "vtc_steps": PASS * -(-steps // PASS)}}, CONFIGS)
    launch.set_threads(job, comm)
    compiling = ("off", "on") if arguments.compile or device.type == "cuda" else ("off",)
    rows = [measure_work(work, engine, compile, job, device) for work in WORKS for engine in ("sequential", "vmap") for compile in compiling]
    return {"device": str(device), "threads": torch.get_num_threads(), "clients": CLIENTS, "steps": job.algorithm.vtc_steps, "rows": rows}


def measure_work(work: str, engine: str, compile: str, job: Job, device: torch.device) -> dict[str, Any]:
    """One way to do one kind of work: the first passes (with the compilation, where there is one), and then the steps that count."""
    job = replace(job, run=replace(job.run, compile=compile), training=replace(job.training, engine=engine))
    world = World(job, Communicator(Alone()), device)
    group, phase = world.join()[0].fetch(), world.plan[0]
    carry_out = WORKS[work](phase.steps[0], group, world.client_site(group, phase, 0), world.server_site(phase, 0, Ledger(device)))
    first_s = time_call(carry_out, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_s = time_call(carry_out, device) / (job.algorithm.vtc_steps * CLIENTS)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return {"work": work, "engine": engine, "compile": compile, "first_s": round(first_s, 3), "step_s": round(step_s, 6), "steps_per_s": round(1 / step_s, 1),
            "peak_memory_bytes" if device.type == "cuda" else "resident_memory_bytes": peak}


def time_call(carry_out: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has finished."""
    start = time.perf_counter()
    carry_out()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def run_generator(step: FedVTC, group: Group, site: ClientSite, server_site: ServerSite) -> Callable[[], object]:
    """The generator's training on the statistics of untrained features, as in the first round that has any."""
    latents = step.encode(group, site)
    local = step.measure(latents, site)
    server = step.aggregate(step.found(server_site), require_server(Communicator(Alone()).combine(step.upload(local))), server_site)
    return partial(step.train_generator, group, latents, local, step.read_gaussians(step.publish(server)), site)


def run_classifier(step: FedVTC, group: Group, site: ClientSite, server_site: ServerSite) -> Callable[[], object]:
    """The classifier's training by cross-entropy."""
    return partial(site.train_model, group, cross_entropy)


def render(figures: Mapping[str, Any]) -> str:
    """Figures for people: one a line, and `rows` as a table."""
    lines = [f"{key:<32} {value}" for key, value in figures.items() if key != "rows"]
    rows = figures.get("rows", [])
    table = [tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)] if rows else []
    return "\n".join([*lines, *([align_rows(table, words=3)] if table else [])])


ROUNDS = 15                                                        # of w1 that are timed
CLIENTS, PASS = 4, 5                                               # clients, and batches in one pass over a client's images
IMAGES = CLIENTS * PASS * 64                                       # of the 1,437 digits, so that all batches have one shape
FEW_STEPS = {"cpu": PASS, "cuda": 200}
WORKS = {"vtc": run_generator, "classifier": run_classifier}
BENCHES = {"w1": w1, "vtc": vtc, "fedconv": fedconv, "gefl": gefl, "clients": clients}
