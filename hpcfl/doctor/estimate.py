"""Estimate: what a round of a job would take on these ranks, from timed training batches and the timed wire, and the memory it would need."""
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from hpcfl import tree
from hpcfl.data.shards import list_batch_sizes
from hpcfl.doctor.probes import attempt
from hpcfl.federation.world import World
from hpcfl.runs import launch
from hpcfl.runs.host_limits import read_core_seconds
from hpcfl.settings.job import Job
from hpcfl.training.group import Group
from hpcfl.training.losses import cross_entropy
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn
from hpcfl.tree import Tree
from hpcfl.wire.communicator import SMALL_CALLS, Communicator, require_server
from hpcfl.wire.uplink import choose_wire_type

BATCHES, ENOUGH_S = 5, 2.0                                         # batches that are timed of each architecture, and when fewer will do
GENTLE = 1e-6                                                      # a learning rate that leaves noise what it is
TIMES_AT_WORK = 3                                                  # states of a group that was fetched: its own, those of who takes part, what became of them


@dataclass(frozen=True)
class Load:
    """What one rank would do in a round, by architecture."""

    clients: dict[str, int]
    batches: dict[str, int]                                        # of all these clients together, where all of them take part
    batch_s: dict[str, float]
    needed_bytes: int                                              # on the device that it trains on
    crowding: float = 1.0                                          # times that its threads took while they were timed, for want of a core

    @property
    def train_s(self) -> float:
        """Seconds of a round in which all its clients train."""
        return sum(count * self.batch_s[architecture] for architecture, count in self.batches.items())


@dataclass(frozen=True)
class Estimate:
    """A round, as if whole models were exchanged; all seconds are estimates."""

    clients: int
    loads: tuple[Load, ...]                                        # by rank
    down_bytes: int                                                # one model of each architecture, from the server to a rank that hosts them all
    up_bytes: int                                                  # from each rank
    up_by: str                                                     # the collective: "Reduce" of sums, "Gatherv" of whole models
    down_s: float
    up_s: float
    small_s: float
    train_s: float                                                 # of the rank that has most to do
    state_bytes: int                                               # of all clients: what a checkpoint holds

    @property
    def wire_share(self) -> float:
        """The part of a round that goes into collectives."""
        wire_s = self.down_s + self.up_s + self.small_s
        return wire_s / (wire_s + self.train_s)


def estimate(comm: Communicator, job: Job, device: torch.device, wire: Sequence[Mapping[str, Any]]) -> tuple[Estimate | None, dict[int, str]]:
    """A round of a job, known at the server, and by rank what kept it from being estimated; called by all ranks."""
    quiet = replace(job, run=replace(job.run, compile="off"))      # a minute of compilation is nothing to wait for here
    world, fault = attempt(lambda: World(quiet, comm, device))
    load, failed = attempt(measure_load, world) if world else (None, fault)
    told = comm.gather((load, failed))
    if not comm.is_server:
        return None, {}
    faults = {rank: said for rank, (_, said) in enumerate(require_server(told)) if said}
    return (None, faults) if faults else (estimate_round(world, tuple(each for each, _ in require_server(told) if each is not None), wire), {})


def measure_load(world: World) -> Load:
    """The share of this rank, with a few batches of each of its architectures trained on noise."""
    launch.spare_threads(world)
    job, problem = world.job, world.problem
    hosted = world.architectures(world.mine)
    sizes = {client: len(world.split.train[client]) for client in world.mine}
    batches = {architecture: job.training.epochs * sum(len(list_batch_sizes(sizes[client], job.training.batch)) for client in clients)
               for architecture, clients in hosted.items()}
    held = {architecture: min(len(clients), job.residency.chunk or len(clients)) for architecture, clients in hosted.items()}
    at_once = {architecture: count if problem.device.type == "cuda" else 1 for architecture, count in held.items()}
    had_s, waited_s = read_core_seconds()
    batch_s = {architecture: time_batch(world, architecture, min(job.training.batch, max(sizes[client] for client in clients)), at_once[architecture])
               for architecture, clients in hosted.items()}
    had_s, waited_s = (after - before for before, after in zip((had_s, waited_s), read_core_seconds(), strict=True))
    parts = (world.split.train, world.split.validation, world.split.test)
    images = len(world.corpus.test_labels) + len(world.split.public) + len(world.split.public_validation)
    images += sum(len(part[client]) for part in parts for client in world.mine)
    if job.residency.location == "disk" or (job.residency.location == "host" and problem.device.type == "cuda"):
        states = max((TIMES_AT_WORK * count * count_model_bytes(world, architecture) for architecture, count in held.items()), default=0)
    else:
        states = 2 * sum(len(clients) * count_model_bytes(world, architecture) for architecture, clients in hosted.items())    # before and after an update
    training = max((problem.sizes.memory(architecture) * count for architecture, count in at_once.items()), default=0)
    return Load({architecture: len(clients) for architecture, clients in hosted.items()}, batches, batch_s,
                states + training + images * math.prod(world.corpus.shape), 1 + waited_s / had_s if had_s > 0 else 1.0)


def time_batch(world: World, architecture: str, images: int, clients: int = 1) -> float:
    """Seconds of one step of one client's model on a batch of so many images, by the loop and the optimiser of the job, uncompiled.

    `clients` train beside each other, and the time is an equal part of theirs.
    """
    problem, times = world.problem, list[float]()
    generator = problem.stream("doctor").torch()
    batch = {"x": torch.rand(images, *problem.shape, generator=generator).to(problem.device),
             "y": (torch.arange(images) % problem.classes).to(problem.device)}

    def batches(client: int) -> Iterator[Tree]:
        for _ in range(BATCHES + 1):
            if client == 0:                                        # of those who take their steps together the first
                if problem.device.type == "cuda":
                    torch.cuda.synchronize(problem.device)
                times.append(time.perf_counter())
            if len(times) > BATCHES or (len(times) > 2 and times[-1] - times[0] > ENOUGH_S):
                return
            yield batch
    module = problem.structure(architecture)
    group = Group(architecture, tuple(range(clients)), tree.stack([tree.join(model=module.state_dict())] * clients))
    problem.fit(group, {"model": module}, [Turn(("model",), cross_entropy, Optimizer.from_settings(world.job.training, lr=GENTLE))], batches, where="doctor")
    return median(later - earlier for earlier, later in pairwise(times[1:])) / clients         # the first warms up


def estimate_round(world: World, loads: tuple[Load, ...], wire: Sequence[Mapping[str, Any]]) -> Estimate:
    """The whole of a round from all ranks' shares, for the phase with most rounds."""
    steps = max(world.plan, key=lambda phase: phase.rounds).steps
    publishes, uploads = (any(step.overrides(verb) for step in steps) for verb in ("publish", "aggregate"))
    models = {architecture: count_model_bytes(world, architecture) for architecture in world.problem.sizes.every}
    hosted = sum((Counter(load.clients) for load in loads), Counter())
    gathers = world.job.run.deterministic
    summed = sum(count_summed_bytes(world, architecture) for architecture in models)
    whole = max(sum(count * models[architecture] for architecture, count in load.clients.items()) for load in loads)
    participation = world.job.federation.participation
    down, up, by = sum(models.values()) * publishes, (int(whole * participation) if gathers else summed) * uploads, "Gatherv" if gathers else "Reduce"
    return Estimate(world.clients, loads, down, up, by, interpolate_seconds(wire, "Bcast", down), interpolate_seconds(wire, by, up),
                    SMALL_CALLS * interpolate_seconds(wire, "Bcast", 8),
                    participation * max(load.train_s for load in loads), sum(count * models[architecture] for architecture, count in hosted.items()))


def interpolate_seconds(wire: Sequence[Mapping[str, Any]], collective: str, size: int) -> float:
    """Of a collective of so many bytes of each rank, along straight lines between the timed sizes and on from the largest through the origin; 0 for nothing."""
    timed = [(row["rank_bytes"], row["median_s"]) for row in wire if row["collective"] == collective]
    if not timed or not size:
        return 0.0
    for (small, before), (large, after) in pairwise(timed):
        if size <= large:
            return before + (after - before) * max(0, size - small) / (large - small)
    largest, last = timed[-1]
    return last * max(1.0, size / largest)


def count_model_bytes(world: World, architecture: str) -> int:
    """Of all that a model's state_dict holds."""
    return tree.nbytes(world.problem.structure(architecture).state_dict())


def count_summed_bytes(world: World, architecture: str) -> int:
    """Of the sum of a model's floating leaves as it travels: in their own types, and a count in float64 for each."""
    leaves = tree.select_floating(world.problem.structure(architecture).state_dict()).values()
    return sum(leaf.numel() * choose_wire_type(leaf.dtype).itemsize + 8 for leaf in leaves)
