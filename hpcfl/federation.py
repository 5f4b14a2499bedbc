"""THE loop: phases of rounds of steps; arrows only downward, no rank in sight."""
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from hpcfl.algorithms.base import Algorithm, Phase, Totals, Update
from hpcfl.errors import at
from hpcfl.finite import refuse_broken
from hpcfl.flops import counting
from hpcfl.group import Group
from hpcfl.ledger import Ledger
from hpcfl.residency import Parked
from hpcfl.statistics import Statistics
from hpcfl.tree import Tree
from hpcfl.wording import spoken
from hpcfl.world import World

Versions = dict[str, int]                                          # part -> version
DERIVED = "*"                                                      # the part of leaves that are in no message as they are: as new as the newest


@dataclass(frozen=True)
class State:
    """All that a run is between two rounds: what a checkpoint holds.

    `version` counts the changes of the server's state, `versions` has for each of its parts the one with which it came; `received` says of which versions
    each of this rank's clients downloaded the parts, so that what a device already has is not counted as traffic again. A part is what comes before
    the first slash of a path.
    """

    server: Tree | None                                            # on the server's rank only
    groups: tuple[Group | Parked, ...]                             # this rank's clients, by architecture, put away where they are not at work
    received: dict[int, Versions]
    rows: int = 0                                                  # rounds finished, over all phases
    version: int = 0
    versions: Versions = field(default_factory=dict)               # of parts that have changed since the beginning


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
    return State(world.comm.at_server(world.found), tuple(world.join()), {client: {} for client in world.mine})


def rounds(exchange: "Exchange", state: State | None = None) -> Iterator[tuple[State, Place]]:
    """Run what is left of the plan, from a state or its beginning, yielding the state after each round."""
    state = state or begin(exchange.world)
    for place in schedule(exchange.world)[state.rows:]:
        exchange.wait()                                            # nobody leaves a barrier before all have come: the round begins at one time everywhere
        exchange.ledger.open()
        state = regrouped(exchange.world, state, place.row)
        exchange.forget(place.phase)
        for step in place.phase.steps:
            for half in (exchange.collect, exchange.refine):       # the state before each is let go with it: of a client there are two at most
                state = half(step, state, place)
        state = replace(state, rows=state.rows + 1)
        yield state, place


def regrouped(world: World, state: State, row: int) -> State:
    """The state with each client in a Group of its architecture of this round; a client that changes it begins anew, with nothing downloaded."""
    wanted, begun = world.teams(row), []
    if wanted == [(group.architecture, group.clients) for group in state.groups]:
        return state

    def formed(architecture: str, clients: tuple[int, ...]) -> Group:
        states: dict[int, Tree] = {}
        for group in state.groups:
            stay = set(clients).intersection(group.clients) if group.architecture == architecture else ()
            states |= group.fetch().select(stay).states() if stay else {}
        new = [client for client in clients if client not in states]
        begun.extend(new)
        return Group.of(architecture, states | (world.begun(architecture, new).states() if new else {}))
    groups = tuple(world.park(formed(*team)) for team in wanted)
    return replace(state, groups=groups, received=state.received | {client: {} for client in begun})


@dataclass(frozen=True)
class Message:
    """What a step published: its leaves, and the version of each of its parts."""

    leaves: Tree
    versions: Versions
    version: int                                                   # of the server's state from which it was made

    def downloaded(self, leaves: Iterable[Tensor]) -> dict[str, int]:
        """Bytes of some of the leaves, as a client receives them, by part."""
        owner, sizes = {id(leaf): part(path) for path, leaf in self.leaves.items()}, dict[str, int]()
        for leaf in leaves:
            name = owner.get(id(leaf), DERIVED)
            sizes[name] = sizes.get(name, 0) + leaf.nbytes
        return sizes


def part(path: str) -> str:
    """The part of a Tree that a path belongs to."""
    return path.partition("/")[0]


def changed(one: Tree, other: Tree) -> set[str]:
    """The parts in which two Trees do not hold the very same tensors."""
    return {part(path) for path in one.keys() | other.keys() if one.get(path) is not other.get(path)}


@dataclass
class Exchange:
    """One step of one round: prepare, publish, train, combine, aggregate, publish, refine.

    Clients of the cohort that do not answer in a round take part in none of its steps: they cost the download of what they were asked to work on, and
    keep the state that they had.
    `before_refine` is called with the state between aggregation and the local work on the fresh message, so that its effect can be evaluated.
    """

    world: World
    ledger: Ledger
    before_refine: Callable[[State, Place], None]
    published: dict[Algorithm, Message] = field(default_factory=dict, init=False)

    def collect(self, step: Algorithm, state: State, place: Place) -> State:
        """The first half: prepare, publish, train, combine, aggregate."""
        answers = self.world.answers(place.phase, place.row)
        if step.overrides("prepare"):
            state = self.serve(step.prepare, step, state, place)
        if step.overrides("train"):
            message = self.publish(step, state)
            if step is place.phase.asks:
                self.ask_in_vain(step, message, state, answers.lost)
            state, statistics = self.work(step.train, step, message, state, place, answers.answered, "train")
            self.wait()
            if answers.answered:                                   # else there is nothing to aggregate: the server keeps its state
                with self.ledger("combine"):
                    totals = self.world.comm.combine(statistics)
                if step.overrides("aggregate"):
                    state = self.serve(step.aggregate, step, state, place, totals)
        return state

    def refine(self, step: Algorithm, state: State, place: Place) -> State:
        """The second half: publish, refine."""
        if step.overrides("refine"):
            message = self.publish(step, state)
            self.before_refine(state, place)
            answers = self.world.answers(place.phase, place.row)
            state, _ = self.work(step.refine, step, message, state, place, answers.answered, "refine")
            self.wait()
        return state

    def serve(self, verb: Callable[..., Tree], step: Algorithm, state: State, place: Place, *what: Totals) -> State:
        """The server's next state under one verb; ranks that take no share of its work wait, and so does the server for those that do."""
        world, comm = self.world, self.world.comm
        site = world.server_site(place.phase, place.round, self.ledger, place.row)

        def help_with(shared: str, items: dict[int, Tree]) -> dict[int, Tree]:
            start = time.perf_counter()
            with self.ledger("spread"):
                results = getattr(step, shared)(items, site)
            self.ledger.helped(len(items), time.perf_counter() - start)
            return results
        draws, where = f"server/{place.phase.name}/{verb.__name__}", f"server, phase {place.phase.name}, round {place.round}, {verb.__qualname__}"
        with self.ledger("aggregate" if comm.is_server else "idle"), world.problem.stream(draws, round_=place.round).seeding():
            server = comm.at_server(verb, state.server, *what, site, help_with=help_with, waiting=lambda: self.ledger("idle"))
        if comm.is_server:
            refuse_broken(server, state.server, where, f"lower {world.problem.rates()}", *what)
        news = comm.share(changed(state.server, server) if comm.is_server else None)
        if not news:                                               # a step that gives back what it got has nothing new to say
            return state
        return replace(state, server=server, version=state.version + 1, versions=state.versions | dict.fromkeys(news, state.version + 1))

    def wait(self) -> None:
        """Wait for all ranks: what the slowest costs the others is booked as idle, not as the work that follows."""
        with self.ledger("idle"):
            self.world.comm.barrier()

    def publish(self, step: Algorithm, state: State) -> Message:
        """What every client may read now; of what a step published before, only the parts are moved that have changed since."""
        before = self.published.get(step)
        if before is None or before.version != state.version:
            with self.ledger("publish"), self.world.problem.stream("publish", round_=state.version).seeding():
                self.published[step] = self.moved(step, state, before or Message({}, {}, -1))
        return self.published[step]

    def forget(self, phase: Phase) -> None:
        """Let go of what the steps of earlier phases published."""
        self.published = {step: message for step, message in self.published.items() if step in phase.steps}

    def moved(self, step: Algorithm, state: State, before: Message) -> Message:
        """The message of a step at every rank."""
        comm = self.world.comm
        whole = step.publish(state.server) if comm.is_server else {}
        if comm.is_server:
            looked_at = set(map(id, state.server.values()))
            derived = {path: leaf for path, leaf in whole.items() if id(leaf) not in looked_at}
            refuse_broken(derived, before.leaves, f"server, {type(step).__name__}.publish", f"lower {self.world.problem.rates()}")
        own = dict.fromkeys(map(part, state.server), 0) | state.versions if comm.is_server else {}
        versions = comm.share({part(path): own.get(part(path), state.version) for path in whole})        # a part that is not the server's own is derived
        news = {name for name, version in versions.items() if before.versions.get(name) != version}
        moved = comm.from_server(lambda: {path: leaf for path, leaf in whole.items() if part(path) in news})
        kept = {path: leaf for path, leaf in before.leaves.items() if part(path) in versions.keys() - news}
        return Message(whole or kept | moved, versions, state.version)

    def hand_out(self, step: Algorithm, message: Message, architecture: str, clients: Sequence[int], received_out: dict[int, Versions]) -> Tree:
        """What clients of an architecture download of a message; what they do not have yet is booked, and noted as what they have."""
        download = step.receive(message.leaves, architecture)
        sizes = message.downloaded(download.values())
        versions = {name: message.versions.get(name, message.version) for name in sizes}
        for client in clients:
            known = received_out[client]
            self.ledger.downloaded(client, sum(sizes[name] for name in sizes if known.get(name) != versions[name]))
            received_out[client] = known | versions
        return download

    def ask_in_vain(self, step: Algorithm, message: Message, state: State, lost: Sequence[int]) -> None:
        """Book the download of clients that will not answer; they are as they were before, so that they download it again when they are asked again."""
        for group in state.groups:
            clients = [client for client in group.clients if client in lost]
            if clients:
                self.hand_out(step, message, group.architecture, clients, dict(state.received))

    def work(self, verb: Callable[..., Update], step: Algorithm, message: Message, state: State, place: Place, cohort: tuple[int, ...],
             name: str) -> tuple[State, Statistics]:
        """This rank's share of those who take part under one verb, group by group; what goes down and up is counted per client."""
        groups, received, total = list(state.groups), dict(state.received), Statistics()
        for position, group in enumerate(groups):
            present = [client for client in group.clients if client in cohort]
            if present:
                download = partial(self.hand_out, step, message, group.architecture, present, received)
                groups[position], statistics = self.at_work(verb, group, present, download, place, name)
                with self.ledger("combine"):                       # sums in the room of one, unless they are to be added in client order
                    total = total + statistics if self.world.comm.deterministic else (total + statistics).reduced()
        self.ledger.uploaded(total.simulated_bytes())
        return replace(state, groups=tuple(groups), received=received), total

    def at_work(self, verb: Callable[..., Update], parked: Group | Parked, present: Sequence[int], download: Callable[[], Tree],
                place: Place, name: str) -> tuple[Group | Parked, Statistics]:
        """A group after the work of those of its clients who take part, put away again, and what they send up."""
        world, start = self.world, time.perf_counter()
        with self.ledger(name), world.problem.stream(f"{place.phase.name}/{name}", present[0], place.round).seeding():
            message = download()
            with counting(world.job.evaluation.flops and place.round == 0) as counter:
                whole = parked.fetch()
                group = whole.select(present)
                site = world.client_site(group, place.phase, place.round)
                with at(lambda: spoken(group.clients, "client")):
                    update = verb(group, message, site)
                parked = world.park(whole.updated(update.group))
        costs = {"seconds": time.perf_counter() - start} | ({"flops": counter.flops} if counter else {})
        share = site.sizes(group) / site.sizes(group).sum()        # a client's part of its group's, by images
        self.ledger.measured(name, group.clients, update.metrics)
        self.ledger.spent(name, group.clients, {cost: spent * share for cost, spent in costs.items()})
        return parked, update.statistics
