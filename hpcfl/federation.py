"""THE loop: phases of rounds of steps; arrows only downward, no rank in sight."""
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

from hpcfl import tree
from hpcfl.algorithms.base import Algorithm, Phase, Totals, Update
from hpcfl.group import Group
from hpcfl.ledger import Ledger
from hpcfl.statistics import Statistics
from hpcfl.tree import Tree
from hpcfl.world import World


@dataclass(frozen=True)
class State:
    """All that a run is between two rounds: what a checkpoint holds.

    `version` counts the changes of the server's state; `received` is the version that each of this rank's clients downloaded last, so that what a
    device already has is not counted as traffic again.
    """

    server: Tree | None                                            # on the server's rank only
    groups: tuple[Group, ...]                                      # this rank's clients, by architecture
    received: dict[int, int]
    rows: int = 0                                                  # rounds finished, over all phases
    version: int = 0


@dataclass(frozen=True)
class Place:
    """Where in the plan a round lies."""

    phase: Phase
    round: int                                                     # inside the phase
    row: int                                                       # over all phases
    last: bool                                                     # of its phase


def schedule(world: World) -> list[Place]:
    """Every round of the plan in order."""
    places = [(phase, round_) for phase in world.plan for round_ in range(phase.rounds)]
    return [Place(phase, round_, row, round_ == phase.rounds - 1) for row, (phase, round_) in enumerate(places)]


def begin(world: World) -> State:
    """The state before the first round."""
    return State(world.comm.at_server(world.found), tuple(world.join()), dict.fromkeys(world.mine, -1))


def rounds(exchange: "Exchange", state: State) -> Iterator[tuple[State, Place]]:
    """Run what is left of the plan, yielding the state after each round."""
    for place in schedule(exchange.world)[state.rows:]:
        exchange.ledger.open()
        state = regrouped(exchange.world, state, place.row)
        for step in place.phase.steps:
            state = exchange(step, state, place)
        state = replace(state, rows=state.rows + 1)
        yield state, place


def regrouped(world: World, state: State, row: int) -> State:
    """The state with each client in the Group of its architecture of this round; a client that changes it begins anew, with nothing downloaded."""
    wanted = world.architectures(world.mine, row)
    if wanted == {group.architecture: group.clients for group in state.groups}:
        return state
    kept = {client: own for group in state.groups for client, own in group.states().items() if client in wanted.get(group.architecture, ())}
    begun = {client: own for group in world.join(row, [client for client in world.mine if client not in kept]) for client, own in group.states().items()}
    groups = tuple(Group.of(architecture, {client: (kept | begun)[client] for client in clients}) for architecture, clients in wanted.items())
    return replace(state, groups=groups, received=state.received | dict.fromkeys(begun, -1))


@dataclass
class Exchange:
    """One step of one round: prepare, publish, train, combine, aggregate, publish, refine.

    `before_refine` is called with the state between aggregation and the local work on the fresh message, so that its effect can be evaluated.
    """

    world: World
    ledger: Ledger
    before_refine: Callable[[State, Place], None]
    published: tuple[Algorithm, int, Tree] | None = field(default=None, init=False)

    def __call__(self, step: Algorithm, state: State, place: Place) -> State:
        cohort = self.world.cohort(place.phase, place.row)
        if step.overrides("prepare"):
            state = self.serve(step.prepare, step, state, place)
        if step.overrides("train"):
            message = self.publish(step, state)
            state, statistics = self.work(step.train, step, message, state, place, cohort, "train")
            self.wait()
            with self.ledger("combine"):
                totals = self.world.comm.combine(statistics)
            if step.overrides("aggregate"):
                state = self.serve(step.aggregate, step, state, place, totals)
        if step.overrides("refine"):
            message = self.publish(step, state)
            self.before_refine(state, place)
            state, _ = self.work(step.refine, step, message, state, place, cohort, "refine")
            self.wait()
        return state

    def serve(self, verb: Callable[..., Tree], step: Algorithm, state: State, place: Place, *what: Totals) -> State:
        """The server's next state under one verb; ranks that take no share of its work wait, and so does the server for those that do."""
        world, comm = self.world, self.world.comm
        site = world.server_site(place.phase, place.round, self.ledger, place.row)

        def help_with(shared: str, items: dict[int, Tree]) -> dict[int, Tree]:
            with self.ledger("aggregate"):
                return getattr(step, shared)(items, site)
        with self.ledger("aggregate" if comm.is_server else "idle"):
            server = comm.at_server(verb, state.server, *what, site, help_with=help_with, waiting=lambda: self.ledger("idle"))
        if not comm.agree(server is not state.server):             # a step that gives back what it got has nothing new to say
            return state
        return replace(state, server=server, version=state.version + 1)

    def wait(self) -> None:
        """Wait for all ranks: what the slowest costs the others is booked as idle, not as the work that follows."""
        with self.ledger("idle"):
            self.world.comm.barrier()

    def publish(self, step: Algorithm, state: State) -> Tree:
        """What every client may read now; moved only when the server's state has changed since."""
        if self.published is None or self.published[:2] != (step, state.version):
            with self.ledger("publish"):
                self.published = step, state.version, self.world.comm.from_server(step.publish, state.server)
        return self.published[2]

    def work(self, verb: Callable[..., Update], step: Algorithm, message: Tree, state: State, place: Place, cohort: tuple[int, ...],
             name: str) -> tuple[State, Statistics]:
        """This rank's share of the cohort under one verb, group by group; what goes down and up is counted per client."""
        world, groups, received, statistics = self.world, list(state.groups), dict(state.received), []
        for position, whole in enumerate(groups):
            present = [client for client in whole.clients if client in cohort]
            if not present:
                continue
            group = whole.select(present)
            download = step.receive(message, group.architecture)
            for client in group.clients if download else ():       # an empty message tells nothing of this version
                if received[client] != state.version:
                    self.ledger.downloaded(client, tree.nbytes(download))
                received[client] = state.version
            site, start = world.client_site(group, place.phase, place.round), time.perf_counter()
            with self.ledger(name):
                update = verb(group, download, site)
            seconds = (time.perf_counter() - start) * site.sizes(group) / site.sizes(group).sum()      # a client's part of its group's, by images
            self.ledger.measured(name, group.clients, {**update.metrics, "seconds": seconds})
            statistics.append(update.statistics)
            groups[position] = whole.updated(update.group)
        total = reduce(add, statistics, Statistics())
        self.ledger.uploaded(total.simulated_bytes())
        return replace(state, groups=tuple(groups), received=received), total
