"""The benchmark of FedConv's server: the method's own code on images of noise, timed by the step and as the work of whole rounds."""
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F

from hpcfl import tree
from hpcfl.algorithms.fedconv import Config, FedConv
from hpcfl.bench.noise import draw_noise
from hpcfl.bench.timing import measure_elapsed, to_milliseconds
from hpcfl.contract import Algorithm, Problem, Totals
from hpcfl.data.shards import Shard, iterate_epochs
from hpcfl.federation.exchange import Exchange
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.state import Place, State, schedule
from hpcfl.federation.world import World
from hpcfl.runs import devices
from hpcfl.runs.choices import CHOICES
from hpcfl.settings.job import Job, resolve
from hpcfl.training.group import Group
from hpcfl.wire.communicator import Communicator, require_server
from hpcfl.wire.uplink import Uploads

CLASSES_OF_SIZE = [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]                   # the authors' ten clients
EPOCHS = {"server_epochs": 1, "first_epochs": 2, "filter_epochs": 2, "server_finetune": 1, "aggregation_epochs": 2}   # a tenth of the authors'
BATCH = 32
FEW_STEPS = {"cpu": 30, "cuda": 94}                                # in an epoch; 94: 5 % of MNIST, the authors' public set
REPETITIONS = 5
ENGINES = {"cpu": ("sequential",), "cuda": ("sequential", "vmap")}                     # the last is what "auto" takes
WORKS = {"engine_step_ms": "server", "compression_step_ms": "compression", "dilation_step_ms": "dilation",
         "aggregation_step_ms": "aggregation"}                     # figure -> first word of what the models are trained for


def fedconv(comm: Communicator, arguments: Namespace) -> dict[str, Any]:
    """The server's rounds of FedConv for MNIST's net (1x28x28, batch 32) and ten clients, four of either smaller size, spread over all ranks.

    `*_step_ms`: one step of one model, batch included and validation between epochs excluded: of W in plain PyTorch and by `fit`, of compression and
    dilation filters (mean over both sizes), of the weights of ten models with the KL term. `server_phase_s`: all the server does in a round with a tenth of
    the authors' epochs, validation included, and `idle_s` of each rank in it. Medians over `--rounds` repetitions, plain steps and rounds in turn.
    """
    device = devices.choose_device(arguments.device, comm.local_rank)
    steps, repetitions = arguments.steps or FEW_STEPS[device.type], arguments.rounds or REPETITIONS
    job = resolve({"run": {"name": "fedconv", "threads": arguments.threads}, "data": {"image_size": 28, "public_fraction": 0.05},
                   "models": {"names": ["fedconv"], "feature_size": 0, "sizes": CLASSES_OF_SIZE},
                   "federation": {"clients": len(CLASSES_OF_SIZE), "rounds": repetitions},
                   "algorithm": {"name": "fedconv", "public_batch": BATCH, **EPOCHS}}, CHOICES)
    devices.set_threads(job, comm)
    rows = [{"engine": engine, **measure_engine(FedConvNoise(replace(job, training=replace(job.training, engine=engine)), comm, device, BATCH * steps))}
            for engine in ENGINES[device.type]]
    head = {"ranks": comm.size, "threads": torch.get_num_threads(), "device": str(device), "clients": len(CLASSES_OF_SIZE), "steps_per_epoch": steps,
            "repetitions": repetitions}
    return head | rows[-1] | ({"rows": rows} if len(rows) > 1 else {})


class Timed(FedConv):
    """FedConv that books every training on the public set: (first word of its purpose, architecture) -> seconds of one step of one model."""

    def __init__(self, config: Config, problem: Problem) -> None:
        super().__init__(config, problem)
        self.laps: dict[tuple[str, str], list[float]] = defaultdict(list)

    def train_public(self, site, group, module, count, lr, purpose, *others, **named) -> Group:
        start = time.perf_counter()
        trained = super().train_public(site, group, module, count, lr, purpose, *others, **named)      # reads its losses back: the device has finished
        steps = count * len(site.require_public()[0]) // BATCH * len(group.clients)
        self.laps[purpose.split()[0], group.architecture].append((time.perf_counter() - start) / steps)
        return trained


class FedConvNoise(World):
    """FedConv with its steps timed and a public set of random images of 28x28 pixels, so that there is no data set to get; the clients' own are never read."""

    def __init__(self, job: Job, comm: Communicator, device: torch.device, images: int) -> None:
        super().__init__(job, comm, device)
        self.images = images
        self.plan = (replace(self.plan[0], steps=(Timed(job.algorithm, self.problem),)),)

    @cached_property
    def public(self) -> tuple[Shard, Shard]:
        """So many images, and a tenth of it to select by."""
        problem = self.problem
        return draw_noise(problem, problem.stream("public"), self.images), draw_noise(problem, problem.stream("validation"), self.images // 10)


def measure_engine(world: FedConvNoise) -> dict[str, Any]:
    """The figures of one engine, from plain steps and rounds taken in turn; known at the server."""
    comm, ledger = world.comm, Ledger(world.problem.device)
    exchange, state = Exchange(world, ledger, lambda *_: None), State(comm.at_server(world.found), (), {})
    plain, accounts = [], []
    for place in schedule(world):
        plain.append(time_plain_step(world, place.row))
        comm.barrier()
        ledger.open()
        state = run_server_phase(exchange, state, place)
        accounts.append(ledger.close())
    told = comm.gather(([account["seconds"]["idle"] for account in accounts], [dict(step.laps) for step in world.plan[0].steps]))
    if not comm.is_server:
        return {}
    answers = require_server(told)
    laps = [each for _, booked in answers for each in booked]
    return {"plain_step_ms": to_milliseconds(median(plain)), **{figure: to_milliseconds(average_steps(laps, work)) for figure, work in WORKS.items()},
            "server_phase_s": round(median(account["wall_s"] for account in accounts), 3), "idle_s": [round(median(idle), 3) for idle, _ in answers]}


def run_server_phase(exchange: Exchange, state: State, place: Place) -> State:
    """All that the server and its helpers do in a round, between which clients send back what they received."""
    step, = place.phase.steps
    state = exchange.serve(step, "prepare", state, place)
    return exchange.serve(step, "aggregate", state, place, return_untrained(step, state) if exchange.world.comm.is_server else {})


def return_untrained(step: Algorithm, state: State) -> Totals:
    """Uploads of clients that trained nothing."""
    message = step.publish(state.at_server())
    return {"models": Uploads({client: tree.join(model=step.receive(message, architecture)) | {"samples": torch.tensor(100.0, dtype=torch.float64)}
                               for client, architecture in enumerate(step.problem.architectures)})}


def time_plain_step(world: FedConvNoise, row: int) -> float:
    """Seconds of a step of the full model in plain PyTorch: a module, autograd, torch.optim.Adam and the default memory format, as the authors' code."""
    problem, (public, _) = world.problem, world.public
    with problem.stream("plain").seeding():
        model = problem.model(problem.common_base()).to(problem.device)
    optimizer, start = torch.optim.Adam(model.parameters(), world.job.algorithm.server_lr), time.perf_counter()
    for batch in iterate_epochs(public, BATCH, 1, problem.stream("plain", round_=row)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        loss.backward()
        optimizer.step()
    return measure_elapsed(start, problem.device) / (len(public) // BATCH)


def average_steps(laps: Sequence[Mapping[tuple[str, str], list[float]]], work: str) -> float:
    """The median of each architecture's steps of one kind on any rank, and of these the mean."""
    by_architecture: dict[str, list[float]] = defaultdict(list)
    for each in laps:
        for (kind, architecture), seconds in each.items():
            by_architecture[architecture] += seconds if kind == work else []
    return mean(median(seconds) for seconds in by_architecture.values() if seconds)
