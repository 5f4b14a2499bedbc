"""Exchange: one step of one round: what the server does, what the clients do, and what moves between them."""
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, contiguous_format

from hpcfl import tree
from hpcfl.contract import Algorithm, ClientSite, Totals, Update
from hpcfl.contract.verbs import blame, check_kept, check_unwritten, require_results, require_tree, require_update, verb_text
from hpcfl.errors import note_whom
from hpcfl.federation.delivery import Delivery, Message
from hpcfl.federation.finite import refuse_broken
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.residency import Parked
from hpcfl.federation.state import Place, State, Versions
from hpcfl.federation.world import World
from hpcfl.models.flops import counting
from hpcfl.training.group import Group
from hpcfl.tree import Tree
from hpcfl.wire.uplink import Uplink
from hpcfl.wording import numbers_text


@dataclass
class Exchange:
    """The two halves of a step in a round: prepare, publish, train, combine, aggregate; then publish, refine.

    Clients of the cohort that do not answer take part in no step of the round: they download what they were asked to work on, and keep the state that they had.
    `before_refine` is called with the state after aggregation, before clients first work on the fresh message; so the effect of that work can be evaluated.
    """

    world: World
    ledger: Ledger
    before_refine: Callable[[State, Place], None]
    delivery: Delivery = field(init=False)

    def __post_init__(self) -> None:
        self.delivery = Delivery(self.world.comm, self.world.home)

    def collect(self, step: Algorithm, state: State, place: Place) -> State:
        """The first half of a step: prepare, publish, train, combine, aggregate."""
        answers = self.world.ask(place.phase, place.row)
        if step.overrides("prepare"):
            state = self.serve(step, "prepare", state, place)
        if step.overrides("train"):
            asks = step is place.phase.asks                        # then its message goes to the whole cohort, lost clients included
            message = self.publish(step, state, self.world.architectures(answers.cohort if asks else answers.answered, place.row))
            if asks:
                self.ask_in_vain(message, state, frozenset(answers.lost))
            state, uplink = self.work(step, "train", message, state, place, frozenset(answers.answered))
            self.wait()
            if answers.answered:                                   # otherwise there is nothing to aggregate, and the server keeps its state
                with self.ledger("combine"), blame(step, "train"):
                    totals = self.world.comm.combine(uplink)
                if step.overrides("aggregate"):
                    state = self.serve(step, "aggregate", state, place, totals)
        return state

    def refine(self, step: Algorithm, state: State, place: Place) -> State:
        """The second half of a step: publish, refine."""
        if step.overrides("refine"):
            answers = self.world.ask(place.phase, place.row)
            message = self.publish(step, state, self.world.architectures(answers.answered, place.row))
            if step is place.phase.refiner:
                self.before_refine(state, place)
            state, _ = self.work(step, "refine", message, state, place, frozenset(answers.answered))
            self.wait()
        return state

    def serve(self, step: Algorithm, verb: str, state: State, place: Place, *totals: Totals | None) -> State:
        """The state after the server's work under one verb. Other ranks take the share of it that the server spreads, and otherwise wait."""
        world, comm = self.world, self.world.comm
        site = world.server_site(place.phase, place.round, self.ledger, place.row)

        def work_on_items(shared: str, items: dict[int, Tree]) -> dict[int, Tree]:
            start = time.perf_counter()
            with self.ledger("spread"), blame(step, shared):
                results = require_results(verb_text(step, shared), getattr(step, shared)(items, site), items)
            self.ledger.book_help(len(items), time.perf_counter() - start)
            return results

        def serve_here() -> tuple[Tree, set[str]]:
            before, where = dict(state.at_server()), verb_text(step, verb)
            marks = tree.marks(before)
            with blame(step, verb), step.problem.stream(f"server/{place.phase.name}/{verb}", round_=place.round).seeding():
                server = require_tree(where, getattr(step, verb)(state.server, *totals, site))
            check_kept(where, before, server)
            server = tree.transform(server, lambda leaf: leaf.clone() if leaf.is_inference() else leaf)      # torch would not count writes into it
            changed = tree.find_changed(marks, server)
            kept = {path: leaf for path, leaf in before.items() if path not in changed or leaf is not server.get(path)}      # less what was written in place
            refuse_broken(server, kept, f"server, phase {place.phase.name}, round {place.round}, {where}", f"lower {step.problem.rates()}", *totals)
            return server, {tree.root(path) for path in changed}
        with self.ledger("aggregate" if comm.is_server else "idle"):
            server, parts = comm.at_server(serve_here, help_with=work_on_items, waiting=lambda: self.ledger("idle")) or (None, None)
        parts = comm.share(parts)                                  # those that have changed
        if not parts:                                              # the step gave back the very state that it got: nobody needs to download anything
            return state
        return replace(state, server=server, version=state.version + 1, versions=state.versions | dict.fromkeys(parts, state.version + 1))

    def wait(self) -> None:
        """Wait for all ranks; the seconds are booked as idle, not as part of the work that follows."""
        with self.ledger("idle"):
            self.world.comm.barrier()

    def publish(self, step: Algorithm, state: State, readers: Mapping[str, Sequence[int]]) -> Message:
        """The message of a step, its downloads at the ranks that host the readers; readers: architecture -> clients."""
        with self.ledger("publish"):
            return self.delivery.publish(step, state, readers)

    def hand_out(self, message: Message, architecture: str, clients: Sequence[int], received_out: dict[int, Versions]) -> None:
        """Book what clients of an architecture download, less what they have already, and note in `received_out` that they have it."""
        parts = message.downloads[architecture].parts
        versions = {name: version for name, (version, _) in parts.items()}
        for client in clients:
            has = received_out[client]
            self.ledger.book_download(client, sum(count for name, (version, count) in parts.items() if has.get(name) != version))
            received_out[client] = has | versions

    def ask_in_vain(self, message: Message, state: State, lost: frozenset[int]) -> None:
        """Book the download of clients that will not answer. Their state stays as it was, so they download it again when they are asked again."""
        for group in state.groups:
            clients = [client for client in group.clients if client in lost]
            if clients:
                self.hand_out(message, group.architecture, clients, dict(state.received))

    def work(self, step: Algorithm, verb: str, message: Message, state: State, place: Place, answered: frozenset[int]) -> tuple[State, Uplink]:
        """This rank's part of the clients' work under one verb, Group by Group; downloads and uploads are booked for each client."""
        groups, received, total = list(state.groups), dict(state.received), Uplink()
        for position, group in enumerate(groups):
            present = [client for client in group.clients if client in answered]
            if present:
                self.hand_out(message, group.architecture, present, received)
                with blame(step, verb, numbers_text(present, "client")):
                    groups[position], uplink = self.work_on(step, verb, group, present, message, place)
                    with self.ledger("combine"):                   # a sum takes the memory of one, unless clients must be added in order
                        total = total + uplink if self.world.comm.deterministic else (total + uplink).reduce()
        self.ledger.book_uploads(total.simulated_bytes())
        return replace(state, groups=tuple(groups), received=received), total

    def work_on(self, step: Algorithm, verb: str, parked: Group | Parked, present: Sequence[int], message: Message, place: Place
                ) -> tuple[Group | Parked, Uplink]:
        """A Group, parked again, after the work of those of its clients that are present, and what they send up."""
        world, start = self.world, time.perf_counter()
        with self.ledger(verb), world.problem.stream(f"{place.phase.name}/{verb}", present[0], place.round).seeding():
            download = self.delivery.download(message, parked.architecture)
            with counting(world.job.evaluation.flops and place.round == 0) as counter:
                whole = parked.fetch()
                group = whole.select(present)
                site = world.client_site(group, place.phase, place.round)
                with note_whom(lambda: numbers_text(group.clients, "client")):
                    update = call_verb(step, verb, group, download, site)
                parked = world.park(whole.with_rows(update.group))
        costs = {"seconds": time.perf_counter() - start} | ({"flops": counter.flops} if counter else {})
        share = site.sizes(group) / site.sizes(group).sum()        # each client's share of its Group's costs, by images
        self.ledger.book_metrics(verb, group.clients, update.metrics)
        self.ledger.book_costs(verb, group.clients, {cost: spent * share for cost, spent in costs.items()})
        return parked, update.uplink


def call_verb(step: Algorithm, verb: str, group: Group, message: Tree, site: ClientSite) -> Update:
    """Call a client's verb and check what it gives.

    A leaf that the verb wrote in place becomes another tensor: who compares leaves by identity must see the change. A leaf that it took from the message gets
    memory of its own, for the message is the server's.
    """
    own, read, where = tree.marks(group.state), tree.marks(message), verb_text(step, verb, numbers_text(group.clients, "client"))
    update = require_update(where, getattr(step, verb)(group, message, site), group, heard=verb == "train" and step.overrides("aggregate"))
    check_unwritten(where, read, message, "the message")
    written, lent = tree.find_changed(own, group.state), {leaf.untyped_storage().data_ptr() for leaf in message.values() if leaf.numel()}

    def settle(path: str, leaf: Tensor) -> Tensor:
        if leaf.untyped_storage().data_ptr() in lent:
            return leaf.clone(memory_format=contiguous_format)
        return leaf.detach() if path in written and leaf is group.state.get(path) else leaf
    return replace(update, group=replace(update.group, state={path: settle(path, leaf) for path, leaf in update.group.state.items()}))
