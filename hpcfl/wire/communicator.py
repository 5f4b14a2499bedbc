"""Communicator, the ranks of a job seen from the algorithms' side: server work, broadcast, combination."""
import heapq
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from hpcfl import tree
from hpcfl.errors import EnvironmentFault, LayoutError
from hpcfl.tree import Tree
from hpcfl.wire import packing
from hpcfl.wire.launchers import ALONE, RELAUNCH, give_folders, read_launch
from hpcfl.wire.ranks import Alone, Audience, Ranks, find_ranks
from hpcfl.wire.uplink import Contribution, Header, SumLayout, Sums, Total, Uplink, Uploads, check_alike, count_payload_bytes, make_header

EXCHANGES = ("bcast", "reduce", "gatherv", "send", "bcast_by_client", "reduce_by_client")            # kinds of `carried`
SMALL_CALLS = 20                                                   # headers, barriers and agreements of a round, each like a collective of 8 bytes
REDUCE_FLOATS = 1 << 22                                            # per Reduce: long enough for the wire, and the buffer takes 16 MiB however long a sum is

Waiting = Callable[[], AbstractContextManager[Any]]
T = TypeVar("T")
Pieces = Mapping[str, Sums | Uploads]
HelpWith = Callable[[str, dict[int, Tree]], dict[int, Tree]]       # (verb, items) -> results under the same keys


@dataclass(frozen=True)
class _Share:
    """What came of one rank's share: its results, or the error that stopped it."""

    results: dict[int, Tree]
    error: Exception | None = None


class Communicator:
    """What the run sees of the other ranks.

    Every method but `spread` is called by all ranks in the same order. `sent_bytes` is the payload that left this rank so far: a broadcast counts
    once per receiver at rank 0, a reduction or gathering once at every other rank; headers are not counted. `carried` has for each of EXCHANGES the
    payload itself, the same for any number of ranks, one included: at rank 0 each leaf of a broadcast and each total of a reduction once, and these again
    times the clients that it is for or from, from which it follows how many ranks they reach; what spread work takes and gives; at every rank what its
    clients bring to a gathering.
    """

    def __init__(self, ranks: Ranks, deterministic: bool = False) -> None:
        """`deterministic`: totals have the same bits for any number of ranks, at the price of gathering what would be reduced."""
        self._ranks, self.deterministic = ranks, deterministic
        self._help_with: HelpWith | None = None
        self._waiting: Waiting = nullcontext
        self.rank, self.size = ranks.rank, ranks.size
        self.local_rank, self.local_size = ranks.local_rank, ranks.local_size      # among the ranks of this host
        self.library, self.standard = ranks.library, ranks.standard
        self.sent_bytes = 0
        self.carried = dict.fromkeys(EXCHANGES, 0)

    @property
    def is_server(self) -> bool:
        """Whether this is rank 0, which also acts as the server."""
        return self.rank == 0

    def at_server(self, function: Callable[..., T], *args: Any, help_with: HelpWith | None = None,
                  waiting: Waiting = nullcontext) -> T | None:
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
        """What rank 0 has for this rank: the leaves of every Tree of {ranks: Tree} whose ranks it is of; rank 0, which gives them, keeps its own objects.

        Paths of Trees that share a rank differ. By one header for all ranks, and one buffer and one broadcast for each Tree among its own ranks alone. The
        others receive host tensors, and what they give themselves does not count.
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
                self.sent_bytes += tree.nbytes(parcel) * (len(audience) - 1)
                mine |= parcel
            elif ranks is not None:
                buffer = packing.allocate([layout])
                self._ranks.bcast_lines(buffer, ranks)
                mine |= tree.unpack(buffer, layout)
        return mine

    def carry(self, kind: str, count: int, clients: int = 0) -> None:
        """Book the payload of an exchange, for a broadcast or a reduction with the number of clients that it is for or from."""
        self.carried[kind] += count
        if clients:
            self.carried[f"{kind}_by_client"] += count * clients

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
        results = self._share(verb, dict(items)) if alone else self._spread_over_ranks(verb, items, costs)
        if len(items) > 1:
            self.carry("send", sum(tree.nbytes(each) for moved in (items, results) for each in moved.values()))
        return {key: tree.to(result, "cpu") for key, result in results.items()}

    def _spread_over_ranks(self, verb: str, items: Mapping[int, Tree], costs: Mapping[int, float] | None) -> dict[int, Tree]:
        shares = _deal(costs or {key: tree.nbytes(item) for key, item in items.items()}, self.size)
        self._ranks.bcast(verb)
        for rank in range(1, self.size):
            self._send({key: items[key] for key in shares[rank]}, rank)
        outcomes = [self._carry_out(verb, {key: items[key] for key in shares[0]})]
        with self._waiting():
            outcomes += [_Share(*self._receive(rank)) for rank in range(1, self.size)]
        for outcome in outcomes:                                   # after all have answered, so that the next message finds everybody listening
            if outcome.error:
                raise outcome.error
        results = {key: result for outcome in outcomes for key, result in outcome.results.items()}
        return {key: results[key] for key in items}

    def combine(self, uplink: Uplink | None) -> dict[str, Total | Uploads] | None:
        """The statistics of all ranks, in host memory at rank 0: a Total per name of Sums, Uploads in ascending client order; None elsewhere.

        A rank without clients takes part with None. Sums travel by Reduce among the ranks that bring some of them, each leaf in its own type and counts in
        float64; deterministic: unsummed, by one Gatherv, then added in ascending client order. Uploads travel in one buffer by one Gatherv.
        Each rank adds up its own in float64. Of float32 leaves every other rank's sum is rounded once to float32 for the wire, MPI adds these up in float32,
        and rank 0 adds its own, which was never rounded: on R ranks the total is off by at most about (R - 1) 2^-24 sum_r |sum of rank r|, on two ranks
        by 2^-24 of the other's sum. Sums beyond 3.4e38 do not fit.
        What is reduced already is used up: the total is made in its memory.
        Raises: LayoutError on every rank where ranks disagree on a name, or where a client uploads twice.
        """
        pieces = {} if uplink is None else uplink.pieces
        if self.size == 1:
            return {name: self._combine_alone(name, piece) for name, piece in sorted(pieces.items())}
        headers = self._ranks.allgather({name: make_header(piece) for name, piece in pieces.items()})
        check_alike(headers, lambda name: self._ranks.allgather(_require_sums(pieces[name]).layout() if name in pieces else ()))
        kinds = {name: kind for each in headers for name, (kind, _, _) in each.items()}
        reduced = {} if self.deterministic else _find_audiences(headers)
        sums = self._reduce(reduced, headers, pieces) if reduced else {}
        whole = {name: kind for name, kind in sorted(kinds.items()) if name not in reduced}
        gathered = self._gather(whole, pieces) if whole else {}
        return dict(sorted({**sums, **gathered}.items())) if self.is_server else None

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
        """Inside the block every call to other ranks goes through watch(the ranks), which is what is given."""
        ranks = self._ranks
        self._ranks = watch(ranks)
        try:
            yield self._ranks
        finally:
            self._ranks = ranks

    def check_launch(self, environment: Mapping[str, str] = os.environ) -> None:
        """Raises EnvironmentFault where a launcher started several ranks but each of them would run alone."""
        if fault := self.find_launch_fault(environment):
            raise EnvironmentFault(fault)

    def find_launch_fault(self, environment: Mapping[str, str] = os.environ) -> str:
        """That a launcher started several ranks of which each sees only itself, and the way out; empty where it is not so."""
        launch = read_launch(environment)
        if self.size > 1 or launch is None or launch.ranks == 1:
            return ""
        return (f"{launch.launcher} started {launch.ranks} ranks ({launch.variable}), but each sees only itself through {self.library}: "
                f"they would run the same job side by side. {RELAUNCH}. {ALONE}")

    def collectives(self, size: int) -> dict[str, Callable[[], object]]:
        """Bcast, Reduce and Gatherv of `size` bytes, a multiple of 8, of every rank, by name: bare and uncounted, to be timed; none where there is one rank."""
        return {} if self.size == 1 else self._ranks.collectives(size)

    def _share(self, verb: str, items: dict[int, Tree]) -> dict[int, Tree]:
        """This rank's share of spread work, in which nobody attends to work that is spread again."""
        help_with, self._help_with = self._help_with, None
        if help_with is None:
            raise RuntimeError(f"rank {self.rank}: asked to help with '{verb}', but its at_server(...) was not told how; give it help_with=...")
        try:
            return help_with(verb, items)
        finally:
            self._help_with = help_with

    def _carry_out(self, verb: str, items: dict[int, Tree]) -> _Share:
        try:
            return _Share(self._share(verb, items) if items else {})
        except Exception as error:                                 # whatever it is, rank 0 raises it
            error.add_note(f"raised on rank {self.rank}:\n{traceback.format_exc()}")
            return _Share({}, error if _survives_pickling(error) else RuntimeError(f"rank {self.rank}: {traceback.format_exc()}"))

    def _serve(self) -> None:
        while (verb := self._ranks.bcast(None)) is not None:
            outcome = self._carry_out(verb, self._receive(0)[0])
            self._send(outcome.results, 0, outcome.error)

    def _send(self, trees: Mapping[int, Tree], rank: int, error: Exception | None = None) -> None:
        self._ranks.send(({key: tree.layout(each) for key, each in trees.items()}, error), rank)
        self._ranks.send_lines(packing.pack(list(trees.values())), rank)
        self.sent_bytes += sum(map(tree.nbytes, trees.values()))

    def _receive(self, rank: int) -> tuple[dict[int, Tree], Exception | None]:
        layouts, error = self._ranks.receive(rank)
        buffer = packing.allocate(list(layouts.values()))
        self._ranks.receive_lines(buffer, rank)
        return dict(zip(layouts, packing.unpack(buffer, list(layouts.values())), strict=True)), error

    def _combine_alone(self, name: str, part: Sums | Uploads) -> Total | Uploads:
        """What one rank has instead of a combination."""
        if isinstance(part, Uploads):
            self.carry("gatherv", sum(map(tree.nbytes, part.trees.values())))
            return _order_uploads([part])
        if self.deterministic:
            self.carry("gatherv", sum(tree.nbytes(each) for _, _, each in _label(name, part)))
            return part.total()
        self.carry("reduce", count_payload_bytes(part.layout()), make_header(part)[2])
        return part.take_total()

    def _reduce(self, audiences: Mapping[str, Audience], headers: Sequence[dict[str, Header]], pieces: Pieces) -> dict[str, Total]:
        """The Total of each name at rank 0, by reductions among its ranks."""
        sums = {name: _require_sums(pieces[name]) for name in audiences if name in pieces}
        layouts = {name: piece.layout() for name, piece in sums.items()}
        if any(name not in headers[0] for name in audiences):      # rank 0 hosts no such client: it learns from the others what the sum looks like
            told = self._ranks.gather({name: layout for name, layout in layouts.items() if name not in headers[0]})
            layouts = {name: layout for each in [*(told or []), layouts] for name, layout in each.items()}
        totals = {name: sums[name].take_total() if name in sums else Total.zero(layout) for name, layout in layouts.items()}
        for audience in sorted(set(audiences.values())):
            ranks, names = self._ranks.among(audience), [name for name in sorted(audiences) if audiences[name] == audience]
            if ranks is not None:
                self._add_up([(totals[name], layouts[name]) for name in names], ranks)
        for name, layout in layouts.items():
            if self.is_server:
                self.carry("reduce", count_payload_bytes(layout), sum(each[name][2] for each in headers if name in each))
            else:
                self.sent_bytes += count_payload_bytes(layout)
        return totals

    def _add_up(self, sums: Sequence[tuple[Total, SumLayout]], ranks: Any) -> None:
        """Add what the other ranks of a communicator have to the Totals of rank 0; each has them all, of the same layouts."""
        leaves: dict[torch.dtype, list[Tensor]] = {}
        for total, layout in sums:
            for path, _, _, dtype in layout:
                leaves.setdefault(dtype, []).append(total.values[path].view(-1))
                leaves.setdefault(torch.float64, []).append(total.counts[path].view(-1))
        for dtype in sorted(leaves, key=str):
            for views in _cut_blocks(leaves[dtype], REDUCE_FLOATS):
                buffer = torch.zeros(sum(map(len, views)), dtype=dtype)
                slots = buffer.split([len(view) for view in views])
                if not self.is_server:                             # rank 0 brings zeros: its own sum is not to be rounded
                    for slot, view in zip(slots, views, strict=True):
                        slot.copy_(view)
                self._ranks.reduce(buffer, ranks)
                if self.is_server:
                    for slot, view in zip(slots, views, strict=True):
                        view.add_(slot)

    def _gather(self, kinds: Mapping[str, str], parts: Pieces) -> dict[str, Total | Uploads]:
        labelled = [labelled for name in kinds if name in parts for labelled in _label(name, parts[name])]
        trees = [each for _, _, each in labelled]
        self.carry("gatherv", sum(map(tree.nbytes, trees)))
        told = self._ranks.gather([(name, label, tree.layout(each)) for name, label, each in labelled])
        if not self.is_server:
            self._ranks.gather_lines(packing.pack(trees))
            self.sent_bytes += sum(map(tree.nbytes, trees))
            return {}
        layouts = [[layout for _, _, layout in each] for each in told]
        lines = [0, *(sum(map(packing.count_lines, each)) for each in layouts[1:])]            # rank 0 need not send to itself
        arrived = packing.unpack(self._ranks.gather_lines(packing.pack([]), lines), list(chain.from_iterable(layouts[1:])))
        pieces: dict[str, list[Any]] = {name: [] for name in kinds}
        for (name, label, _), each in zip(chain.from_iterable(told), [*trees, *arrived], strict=True):
            pieces[name].append(_rebuild(label, each))
        return {name: _order_uploads(found) if kinds[name] == "Uploads" else Sums(tuple(found)).total() for name, found in pieces.items()}


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


def _require_sums(piece: Sums | Uploads) -> Sums:
    if isinstance(piece, Uploads):
        raise LayoutError("Uploads are here what other ranks have as Sums; one name has one kind")
    return piece


def _find_audiences(headers: Sequence[Mapping[str, Header]]) -> dict[str, Audience]:
    """Who takes part in the reduction of each name of Sums: the ranks that bring it, and rank 0."""
    ranks: dict[str, list[int]] = {}
    for rank, brought in enumerate(headers):
        for name, (kind, _, _) in brought.items():
            if kind == "Sums":
                ranks.setdefault(name, [0]).append(rank)
    return {name: tuple(sorted(set(found))) for name, found in ranks.items()}


def _cut_blocks(leaves: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Flat leaves in order, in blocks of at most so many elements."""
    block, room = [], size
    for leaf in leaves:
        while len(leaf):
            block.append(leaf[:room])
            leaf, room = leaf[len(block[-1]):], room - len(block[-1])
            if not room:
                yield block
                block, room = [], size
    if block:
        yield block


def _label(name: str, piece: Sums | Uploads) -> list[tuple[str, Any, Tree]]:
    if isinstance(piece, Uploads):
        return [(name, client, uploaded) for client, uploaded in piece.trees.items()]
    return [(name, contribution.clients, contribution.pack()) for contribution in piece.take_contributions()]


def _rebuild(label: Any, each: Tree) -> Contribution | Uploads:
    return Contribution.unpack(label, each) if isinstance(label, tuple) else Uploads({label: each})


def _order_uploads(uploads: Sequence[Uploads]) -> Uploads:
    merged = {client: uploaded for each in uploads for client, uploaded in each.trees.items()}
    return Uploads({client: tree.transform(merged[client], lambda leaf: leaf.detach().cpu()) for client in sorted(merged)})


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
