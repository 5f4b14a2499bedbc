"""Communicator: the ranks of a job as the run sees them: work at the server, what it distributes, what comes up to it."""
import heapq
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from hpcfl import tree
from hpcfl.errors import EnvironmentFault
from hpcfl.tree import Tree
from hpcfl.wire import packing
from hpcfl.wire.combining import combine_pieces
from hpcfl.wire.launchers import ALONE, RELAUNCH, give_folders, read_launch
from hpcfl.wire.ranks import Alone, Audience, Ranks, find_ranks
from hpcfl.wire.traffic import Traffic
from hpcfl.wire.uplink import Total, Uplink, Uploads

T = TypeVar("T")
HelpWith = Callable[[str, dict[int, Tree]], dict[int, Tree]]       # (verb, items) -> results under the same keys
Waiting = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class _Outcome:
    """What came of one rank's share: its results, or the error that stopped it."""

    results: dict[int, Tree]
    error: Exception | None = None


class Communicator:
    """What the run sees of the other ranks.

    All ranks call every method but `spread`, in the same order. `traffic` is what this rank booked of its exchanges.
    """

    def __init__(self, ranks: Ranks, deterministic: bool = False) -> None:
        """`deterministic`: totals have the same bits for any number of ranks, at the price of gathering what would be reduced."""
        self._ranks, self.deterministic = ranks, deterministic
        self._help_with: HelpWith | None = None
        self._waiting: Waiting = nullcontext
        self.rank, self.size = ranks.rank, ranks.size
        self.local_rank, self.local_size = ranks.local_rank, ranks.local_size      # among the ranks of this host
        self.library, self.standard = ranks.library, ranks.standard
        self.traffic = Traffic()

    @property
    def is_server(self) -> bool:
        """Whether this is rank 0, which also acts as the server."""
        return self.rank == 0

    def at_server(self, function: Callable[..., T], *args: Any, help_with: HelpWith | None = None, waiting: Waiting = nullcontext) -> T | None:
        """function(*args) at rank 0, which may `spread` work meanwhile; None elsewhere.

        `help_with(verb, items)` is how every rank, rank 0 included, carries out its share of that work, {key: Tree} for {key: Tree};
        `waiting()` is entered at rank 0 while it waits for the shares of others.
        """
        self._help_with, self._waiting = help_with, waiting
        try:
            if self.is_server:
                return function(*args)
            self._serve()
            return None
        finally:
            self._help_with = None
            if self.is_server and self.size > 1:
                self._ranks.bcast(None)                           # the others go on even where the server failed

    def distribute(self, parcels: Mapping[Audience, Tree]) -> Tree:
        """What rank 0 has for this rank: the leaves of every parcel whose audience this rank is in.

        Only what rank 0 gives counts. It keeps its own objects, the others receive host tensors. Parcels that reach one rank have different paths. One header
        goes to all ranks, then each parcel in one buffer by one broadcast to its audience alone.
        """
        if self.size == 1:
            return {path: leaf for parcel in parcels.values() for path, leaf in parcel.items()}
        layouts = self._ranks.bcast({audience: tree.layout(parcels[audience]) for audience in sorted(parcels)})
        mine: Tree = {}
        for audience, layout in layouts.items():
            ranks = self._ranks.among(audience)
            if self.is_server:
                parcel = parcels[audience]
                self._ranks.bcast_lines(packing.pack([parcel]), ranks)
                self.traffic.sent_bytes += tree.nbytes(parcel) * (len(audience) - 1)
                mine |= parcel
            elif ranks is not None:
                buffer = packing.allocate([layout])
                self._ranks.bcast_lines(buffer, ranks)
                mine |= tree.unpack(buffer, layout)
        return mine

    def spread(self, verb: str, items: Mapping[int, Tree], costs: Mapping[int, float] | None = None) -> dict[int, Tree]:
        """{key: result} for {key: item}, carried out by all ranks, each by its `help_with(verb, share)`; for rank 0 inside `at_server`.

        `costs`: expected work of each item in any one unit; without it larger items count as more work. Other ranks get host tensors; results are
        host tensors wherever they were made.
        Raises: what a rank raised, with its traceback as a note; RuntimeError outside of an `at_server` that says how to help.
        """
        if self._help_with is None:
            raise RuntimeError(f"rank {self.rank}: spread('{verb}') was called where the other ranks do not attend; call it at rank 0, "
                               "inside at_server(..., help_with=...)")
        alone = self.size == 1 or len(items) < 2
        results = self._help(verb, dict(items)) if alone else self._spread_over_ranks(verb, items, costs)
        if len(items) > 1:
            self.traffic.carry("send", sum(tree.nbytes(each) for moved in (items, results) for each in moved.values()))
        return {key: tree.to(result, "cpu") for key, result in results.items()}

    def combine(self, uplink: Uplink | None) -> dict[str, Total | Uploads] | None:
        """The uplinks of all ranks as one, in host memory at rank 0: a Total per name of Sums, Uploads in ascending client order; None elsewhere.

        A rank without clients takes part with None. Sums travel by Reduce among the ranks that bring some of them, each leaf in its own type and counts in
        float64. Where the run is deterministic they travel unsummed, by one Gatherv, and are added in ascending client order. Uploads travel in one buffer by
        one Gatherv. Each rank adds up its own clients in float64. Every other rank's sum of float32 leaves is rounded once to float32 for the wire, MPI adds
        these in float32, and rank 0 adds its own, which was never rounded: on R ranks the total is off by at most about (R - 1) 2^-24 sum_r |sum of rank r|,
        on two ranks by 2^-24 of the other's sum. Sums beyond 3.4e38 do not fit. A sum that is reduced already is used up: the total is made in its memory.
        Raises: LayoutError on every rank where ranks disagree on a name, or where a client uploads twice.
        """
        return combine_pieces(self._ranks, {} if uplink is None else uplink.pieces, self.deterministic, self.traffic)

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so, known to all."""
        return bool(flag) if self.size == 1 else self._ranks.any(bool(flag))

    def gather(self, value: T) -> list[T] | None:
        """Every rank's small object, in rank order, at rank 0; None elsewhere."""
        return [value] if self.size == 1 else self._ranks.gather(value)

    def share(self, value: Any) -> Any:
        """Rank 0's small object at every rank."""
        return value if self.size == 1 else self._ranks.bcast(value)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self._ranks.barrier()

    def abort(self, code: int) -> None:
        """End all ranks at once; the process of this one exits with `code`."""
        self._ranks.abort(code)

    @contextmanager
    def watched(self, watch: Callable[[Any], Any]) -> Iterator[Any]:
        """Inside the block every call to other ranks goes through watch(ranks), which is what `with` gives."""
        ranks = self._ranks
        self._ranks = watch(ranks)
        try:
            yield self._ranks
        finally:
            self._ranks = ranks

    def check_launch(self, environment: Mapping[str, str] = os.environ) -> None:
        """Refuse a launch of several ranks of which each would run alone. Raises: EnvironmentFault."""
        if fault := self.find_launch_fault(environment):
            raise EnvironmentFault(fault)

    def find_launch_fault(self, environment: Mapping[str, str] = os.environ) -> str:
        """That a launcher started several ranks and each sees only itself, with the way out; empty where all is well."""
        launch = read_launch(environment)
        if self.size > 1 or launch is None or launch.ranks == 1:
            return ""
        return (f"{launch.launcher} started {launch.ranks} ranks ({launch.variable}), but each sees only itself through {self.library}: "
                f"they would run the same job side by side. {RELAUNCH}. {ALONE}")

    def collectives(self, size: int) -> dict[str, Callable[[], object]]:
        """Bcast, Reduce and Gatherv of `size` bytes of every rank, a multiple of 8, to be timed; their traffic is not booked; none where there is one rank."""
        return {} if self.size == 1 else self._ranks.collectives(size)

    def _spread_over_ranks(self, verb: str, items: Mapping[int, Tree], costs: Mapping[int, float] | None) -> dict[int, Tree]:
        """The results in the order of the items; every rank works on its share while rank 0 works on its own."""
        shares = _deal(costs or {key: tree.nbytes(item) for key, item in items.items()}, self.size)
        self._ranks.bcast(verb)
        for rank in range(1, self.size):
            self._send({key: items[key] for key in shares[rank]}, rank)
        outcomes = [self._carry_out(verb, {key: items[key] for key in shares[0]})]
        with self._waiting():
            outcomes += [_Outcome(*self._receive(rank)) for rank in range(1, self.size)]
        for outcome in outcomes:                                   # after all have answered, so that the next message finds everybody listening
            if outcome.error:
                raise outcome.error
        results = {key: result for outcome in outcomes for key, result in outcome.results.items()}
        return {key: results[key] for key in items}

    def _carry_out(self, verb: str, items: dict[int, Tree]) -> _Outcome:
        """The results of this rank's share, or the error that stopped it, which must be able to travel."""
        try:
            return _Outcome(self._help(verb, items) if items else {})
        except Exception as error:                                 # whatever it is, rank 0 raises it
            error.add_note(f"raised on rank {self.rank}:\n{traceback.format_exc()}")
            return _Outcome({}, error if _survives_pickling(error) else RuntimeError(f"rank {self.rank}: {traceback.format_exc()}"))

    def _help(self, verb: str, items: dict[int, Tree]) -> dict[int, Tree]:
        """This rank's share of spread work, in which nobody attends to work that is spread again."""
        help_with, self._help_with = self._help_with, None
        if help_with is None:
            raise RuntimeError(f"rank {self.rank}: asked to help with '{verb}', but its at_server(...) was not told how; give it help_with=...")
        try:
            return help_with(verb, items)
        finally:
            self._help_with = help_with

    def _serve(self) -> None:
        """Attend at another rank to the work that rank 0 spreads, until it says that there is no more."""
        while (verb := self._ranks.bcast(None)) is not None:
            outcome = self._carry_out(verb, self._receive(0)[0])
            self._send(outcome.results, 0, outcome.error)

    def _send(self, trees: Mapping[int, Tree], rank: int, error: Exception | None = None) -> None:
        """Trees to one rank, a header with their layouts first."""
        self._ranks.send(({key: tree.layout(each) for key, each in trees.items()}, error), rank)
        self._ranks.send_lines(packing.pack(list(trees.values())), rank)
        self.traffic.sent_bytes += sum(map(tree.nbytes, trees.values()))

    def _receive(self, rank: int) -> tuple[dict[int, Tree], Exception | None]:
        """What `_send` of another rank sends here."""
        layouts, error = self._ranks.receive(rank)
        buffer = packing.allocate(list(layouts.values()))
        self._ranks.receive_lines(buffer, rank)
        return dict(zip(layouts, packing.unpack(buffer, list(layouts.values())), strict=True)), error


def connect(deterministic: bool = False, checked: bool = True, alone: bool = False) -> Communicator:
    """The ranks of this job: all that MPI knows, or this process alone where there is neither launcher nor MPI, or where nothing else is asked for.

    Raises: EnvironmentFault where a launcher started several ranks that cannot see each other, unless that is not to be checked.
    """
    if alone:
        return Communicator(Alone(), deterministic)
    give_folders()
    communicator = Communicator(find_ranks(), deterministic)
    if checked:
        communicator.check_launch()
    return communicator


def require_server(found: T | None) -> T:
    """What rank 0 alone has: the one place where it is told from the None of other ranks. Raises: RuntimeError at any of these."""
    if found is None:
        raise RuntimeError("only rank 0 has this; ask for it where Communicator.is_server holds")
    return found


def _deal(costs: Mapping[int, float], ranks: int) -> list[list[int]]:
    """Keys to ranks, costliest first, each to the least loaded rank; rank 0, which also sends and collects, comes last among equals."""
    loads = [(0.0, -rank) for rank in range(ranks)]
    heapq.heapify(loads)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for key in sorted(costs, key=lambda key: (-costs[key], key)):
        load, rank = loads[0]
        shares[-rank].append(key)
        heapq.heapreplace(loads, (load + max(costs[key], 1), rank))
    return shares


def _survives_pickling(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:                                              # an error type may fail in any way when rebuilt from its arguments
        return False
