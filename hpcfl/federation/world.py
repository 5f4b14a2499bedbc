"""World: all that follows from the job alone (data, partition, architectures, placement, plan), and this rank's share of it."""
import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcfl.algorithms import PLANS
from hpcfl.contract import Algorithm, ClientSite, Holdings, Phase, Problem, ServerSite
from hpcfl.contract.verbs import blame, check_plan, require_group, require_modules, require_tree, verb_text
from hpcfl.data import corpora, partition
from hpcfl.data.shards import Scale, Shard, load
from hpcfl.errors import DataError, JobError
from hpcfl.federation.answers import Answers, simulate_answers
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.placement import Past, place_clients, resettle
from hpcfl.federation.residency import RESIDENCIES, Parked
from hpcfl.models import zoo
from hpcfl.models.sizes import Sizes
from hpcfl.settings.job import Job
from hpcfl.training.group import Group
from hpcfl.training.optimizers import STEP, Optimizer
from hpcfl.tree import Tree
from hpcfl.wire.communicator import Communicator
from hpcfl.wording import numbers_text


class World:
    """The experiment, seen from one rank: a pure function of the job, and after a restart of where the checkpoint has the clients.

    Every rank computes the same partition, architectures and placement, but reads only the images of its own clients, and the public images when the server's
    work is spread. The official test set is read where it is evaluated.
    """

    def __init__(self, job: Job, comm: Communicator, device: torch.device, past: Past | None = None):
        """`past`: the placement before the restart, as the checkpoint has it."""
        self.job, self.comm = job, comm
        self.clients = job.federation.clients
        self.corpus = corpora.open_corpus(job.data.name)
        self.split = partition.partition_samples(self.corpus.train_labels, self.clients, job.data, job.run.seed)
        self.problem = self._build_problem(device)
        self.plan = PLANS[job.algorithm_name].plan(job.algorithm, self.problem)
        check_plan(job.algorithm_name, self.plan)
        for step in self.steps:
            step.accept(self.split.counts(self.corpus.train_labels, self.problem.classes))
        self._check_single_images()
        self.home = self._place(past)
        self._name_models = lru_cache(maxsize=2)(lambda row: tuple(self.problem.architecture(client, row) for client in range(self.clients)))
        residence = RESIDENCIES[job.residency.location](device, job.residency.folder)
        self.park: Callable[[Group], Group | Parked] = residence.park                    # puts a Group away until it works again
        self._shared: dict[str, tuple[tuple, Any]] = {}                                  # what this rank's clients compute once for all of them
        self._trainings: tuple[object, Counter[int]] = (None, Counter())                 # a round, and how often each client has trained in it

    @cached_property
    def mine(self) -> tuple[int, ...]:
        """The clients that this rank hosts, ascending."""
        return tuple(client for client, rank in enumerate(self.home) if rank == self.comm.rank)

    @cached_property
    def holdings(self) -> Mapping[int, Holdings]:
        """The training and validation images of this rank's clients, on its device."""
        return {client: Holdings(train, validation) for client, (train, validation, _) in self._own.items()}

    @cached_property
    def personal(self) -> Mapping[int, Shard]:
        """The test images of this rank's clients: for evaluation only, no site holds them."""
        return {client: test for client, (_, _, test) in self._own.items()}

    @cached_property
    def _own(self) -> Mapping[int, tuple[Shard, ...]]:
        indices = [split[client] for client in self.mine for split in (self.split.train, self.split.validation, self.split.test)]
        shards = self._load_shards(indices)
        return {client: shards[3 * position:3 * position + 3] for position, client in enumerate(self.mine)}

    @cached_property
    def forward_flops(self) -> tuple[int, ...]:
        """Floating-point operations of one image's forward pass through the model that each client begins with."""
        problem, models = self.problem, self.job.models
        form = problem.shape, problem.classes, models.feature_size, models.norm, models.feature_relu
        return tuple(zoo.count_flops(name, *form) for name in problem.architectures)

    @cached_property
    def _remembered(self) -> Mapping[int, dict[str, torch.Tensor]]:
        return {client: {} for client in self.mine}

    @cached_property
    def test(self) -> Shard:
        """The whole official test set: for evaluation only, no site holds it."""
        return Shard(torch.from_numpy(self.corpus.test_images()), torch.from_numpy(self.corpus.test_labels), self.problem.scale).to(self.problem.device)

    @cached_property
    def public(self) -> tuple[Shard | None, Shard | None]:
        """The server's public images for training and for validation; None where the job sets none aside."""
        if self.job.data.public_fraction == 0:
            return None, None
        public, validation = self._load_shards([self.split.public, self.split.public_validation])
        return public, validation

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, nn.Module]]:
        """The networks of each architecture that this rank hosts; only their structure counts."""
        def build(architecture: str) -> dict[str, nn.Module]:
            built: dict[str, nn.Module] = {}
            for step in self.steps:
                with blame(step, "modules", f"for {architecture}"), self.problem.stream("modules").seeding():
                    found = require_modules(verb_text(step, "modules", f"for {architecture}"), step.modules(architecture))
                built |= {name: module.to(self.problem.device) for name, module in found.items() if name not in built}
            return built
        fixed = self.job.models.size_schedule == "fixed"
        return {architecture: build(architecture) for architecture in (self.architectures(self.mine) if fixed else self.problem.sizes.every)}

    def architectures(self, clients: Sequence[int], row: int = 0) -> Mapping[str, tuple[int, ...]]:
        """Architecture -> those of the clients that have it in a round; both in order."""
        names, found = self._name_models(row), dict[str, list[int]]()
        for client in sorted(clients):
            found.setdefault(names[client], []).append(client)
        return {architecture: tuple(found[architecture]) for architecture in sorted(found)}

    def teams(self, row: int = 0) -> list[tuple[str, tuple[int, ...]]]:
        """The Groups of this rank's clients in a round, as (architecture, clients): at most `residency.chunk` clients each, all in order."""
        hosted = self.architectures(self.mine, row)
        return [(architecture, clients[start:start + size]) for architecture, clients in hosted.items()
                for size in [self.job.residency.chunk or len(clients)] for start in range(0, len(clients), size)]

    def cohort(self, phase: Phase, row: int) -> tuple[int, ...]:
        """The clients that a round asks, a pure function of seed and row; their number is rounded to the nearest, half up."""
        share = Decimal(str(self.job.federation.participation)) * self.clients       # of the decimal as written: 0.29 of 50 is 14.5
        size = self.clients if phase.everyone else max(1, int(share.to_integral_value(ROUND_HALF_UP)))
        drawn = self.problem.stream("cohort", round_=row).numpy().permutation(self.clients)[:size]
        return tuple(sorted(int(client) for client in drawn))

    def ask(self, phase: Phase, row: int) -> Answers:
        """Who of the cohort answers in a round, and when, a pure function of seed and row; all do where the round has no answer to wait for."""
        settings, cohort = self.job.federation, self.cohort(phase, row)
        if (settings.dropout or settings.delay != "none") and phase.asks:
            return simulate_answers(settings, partial(self.problem.stream, round_=row), cohort)
        return Answers(cohort, cohort)

    def client_site(self, group: Group, phase: Phase, round_: int) -> ClientSite:
        """What client code may see in a round, for one Group."""
        holdings = {client: self.holdings[client] for client in group.clients}
        remembered = {client: self._remembered[client] for client in group.clients}
        if self._trainings[0] != (phase, round_):
            self._trainings = (phase, round_), Counter()
        return ClientSite(self.problem, holdings, self.modules[group.architecture], phase.name, round_, remembered, self._shared, self._trainings[1])

    def server_site(self, phase: Phase, round_: int, ledger: Ledger, row: int = 0) -> ServerSite:
        """What server code may see in a round; the same on every rank, for all take a share of its work."""
        return ServerSite(self.problem, *self.public, phase.name, round_, row, self.comm.spread, ledger.note, partial(ledger.book_metrics, "aggregate"))

    def found(self) -> Tree:
        """The server's state before the first round."""
        site = self.server_site(self.plan[0], 0, Ledger(self.problem.device))
        server: Tree = {}
        for step in self.steps:
            with blame(step, "found"), self.problem.stream("found").seeding():
                server |= require_tree(verb_text(step, "found"), step.found(site))
        return server

    def join(self) -> list[Group | Parked]:
        """This rank's Groups as they begin, parked."""
        return [self.park(self.begin_clients(architecture, clients)) for architecture, clients in self.teams()]

    def begin_clients(self, architecture: str, clients: Sequence[int]) -> Group:
        """Clients of an architecture as they begin."""
        group = Group(architecture, tuple(clients), {})
        for step in self.steps:
            whose = numbers_text(clients, "client")
            with blame(step, "join", whose), self.problem.stream("join", group.clients[0]).seeding():
                group = require_group(verb_text(step, "join", whose), step.join(group, self.client_site(group, self.plan[0], 0)), group)
        return group.to(self.problem.device)

    def averages(self, steps: Sequence[Algorithm]) -> dict[str, int]:
        """How many clients average each part that any of the steps averages, by the part's name; with the architectures of the first round."""
        found: dict[str, int] = {}
        hosts = Counter(self.problem.architectures)
        for step in steps:
            counts: Counter[str] = Counter()
            for architecture, clients in hosts.items():
                counts.update(dict.fromkeys(step.averages(architecture), clients))
            found |= {name: max(found.get(name, 0), count) for name, count in counts.items()}
        return dict(sorted(found.items()))

    @property
    def steps(self) -> tuple[Algorithm, ...]:
        """The steps of all phases, each once, in order."""
        return tuple(dict.fromkeys(step for phase in self.plan for step in phase.steps))

    @property
    def has_global_models(self) -> bool:
        """Whether any step has models of the whole federation."""
        return any(step.overrides("global_models") for step in self.steps)

    def _build_problem(self, device: torch.device) -> Problem:
        data = self.job.data
        sample = np.linspace(0, len(self.corpus.train_labels) - 1, num=min(2000, len(self.corpus.train_labels)), dtype=np.int64)
        how = data.normalization, data.image_size
        scale = Scale.from_images(self.corpus.train_images(sample), *how) if data.normalization == "standard" else Scale(*how)
        channels, height, width = self.corpus.shape
        shape = (channels, data.image_size, data.image_size) if data.image_size else (channels, height, width)
        names = self.job.models.names
        for name in names:
            zoo.find_entry(name)
        slots = sum(slot != STEP for slot in Optimizer.from_settings(self.job.training).slots)

        def count_bytes(name: str) -> int:
            models = self.job.models
            form = shape, self.corpus.classes, models.feature_size, models.norm, models.feature_relu
            return zoo.count_training_bytes(name, *form, self.job.training.batch, slots)
        return Problem(self.job, shape, self.corpus.classes, scale, Sizes(self.job.models, self.clients, self.job.run.seed, count_bytes), device)

    def _check_single_images(self) -> None:
        """Refuse batches of one image where a model's BatchNorm would have to take the variance of one value."""
        batch, sizes = self.job.training.batch, [len(indices) for indices in self.split.train]
        if min(batch, *sizes) > 1:
            return
        for name in self.problem.sizes.every:
            try:
                copy.deepcopy(self.problem.structure(name)).train()(torch.zeros(1, *self.problem.shape, device=self.problem.device))
            except ValueError:
                fault = f"trains '{name}' on single images, of which its BatchNorm has no variance; set models.norm = 'group', or"
                if batch == 1:
                    raise JobError(f"training.batch = 1 {fault} training.batch to at least 2") from None
                raise DataError(f"client {sizes.index(1)} has 1 training image and {fault} give every client more: raise data.fraction, use fewer clients or "
                                "a milder data.partition") from None

    def _place(self, past: Past | None) -> tuple[int, ...]:
        ranks, server = self.comm.size, self.job.federation.server_rank
        costs = [len(indices) * flops for indices, flops in zip(self.split.train, self.forward_flops, strict=True)]
        if past is None or len(past.home) != self.clients:         # another job's checkpoint is refused where it is loaded
            return place_clients(costs, ranks, server)
        return resettle(past, costs, ranks, server, self.job.run.deterministic)

    def _load_shards(self, indices: Sequence[np.ndarray]) -> tuple[Shard, ...]:
        return load(self.corpus, indices, self.problem.scale, self.problem.device) if indices else ()
