"""The benchmark of FedVTC's steps: its generator and a small classifier, one client after the other and together, eager and compiled."""
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch

from hpcfl.algorithms.fedvtc import FedVTC
from hpcfl.bench.timing import time_call
from hpcfl.contract import ClientSite, ServerSite
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.world import World
from hpcfl.runs import devices
from hpcfl.runs.choices import CHOICES
from hpcfl.settings.job import Job, resolve
from hpcfl.training.group import Group
from hpcfl.training.losses import cross_entropy
from hpcfl.wire.communicator import Communicator, require_server
from hpcfl.wire.ranks import Alone

CLIENTS, PASS = 4, 5                                               # clients, and batches in one pass over a client's images
IMAGES = CLIENTS * PASS * 64                                       # of the 1,437 digits, so that all batches have one shape
FEW_STEPS = {"cpu": PASS, "cuda": 200}


def vtc(comm: Communicator, arguments: Namespace) -> dict[str, Any]:
    """Steps of FedVTC's generator (p = 64, 1x28x28) and of a small classifier by `fit`: four clients, batch 64, one after the other and together.

    Eager, and compiled too on CUDA or where asked. `step_s` is the time of one client's step, its batch included; every rank measures for itself.
    """
    device = devices.choose_device(arguments.device, comm.local_rank)
    steps = arguments.steps or FEW_STEPS[device.type]
    job = resolve({"run": {"name": "vtc", "threads": arguments.threads},
                   "data": {"fraction": IMAGES / 1437, "image_size": 28, "validation_fraction": 0.0, "test_fraction": 0.0}, "models": {"feature_size": 64},
                   "federation": {"clients": CLIENTS}, "training": {"batch": 64, "epochs": -(-steps // PASS)},
                   "algorithm": {"name": "fedvtc", "vtc_steps": PASS * -(-steps // PASS)}}, CHOICES)
    devices.set_threads(job, comm)
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


def run_generator(step: FedVTC, group: Group, site: ClientSite, server_site: ServerSite) -> Callable[[], object]:
    """The generator's training on the statistics of untrained features, as in the first round that has any."""
    latents = step.encode(group, site)
    local = step.measure(latents, site)
    server = step.aggregate(step.found(server_site), require_server(Communicator(Alone()).combine(step.upload(local))), server_site)
    return partial(step.train_generator, group, latents, local, step.read_gaussians(step.publish(server), site), site)


def run_classifier(step: FedVTC, group: Group, site: ClientSite, server_site: ServerSite) -> Callable[[], object]:
    """The classifier's training by cross-entropy."""
    return partial(site.train_model, group, cross_entropy)


WORKS = {"vtc": run_generator, "classifier": run_classifier}
