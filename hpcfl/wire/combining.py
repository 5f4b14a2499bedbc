"""Combining: the uplinks of all ranks become totals and uploads at rank 0, by reductions of sums and one gathering of what must stay apart."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hpcfl import tree
from hpcfl.errors import LayoutError
from hpcfl.tree import Tree
from hpcfl.wire import packing
from hpcfl.wire.ranks import Audience, Ranks
from hpcfl.wire.traffic import Traffic
from hpcfl.wire.uplink import Contribution, SumLayout, Sums, Total, Uploads, count_payload_bytes, find_difference

REDUCE_FLOATS = 1 << 22                                            # per Reduce: long enough for the wire, and the buffer takes 16 MiB however long a sum is

Pieces = Mapping[str, Sums | Uploads]
Combined = dict[str, Total | Uploads]
Header = tuple[str, str | tuple[int, ...], int]                    # (kind, digest of the layout or clients, how many clients)


def combine_pieces(ranks: Ranks, pieces: Pieces, deterministic: bool, traffic: Traffic) -> Combined | None:
    """What `Communicator.combine` says: a Total per name of Sums and Uploads in ascending client order at rank 0, None elsewhere; books what travels."""
    if ranks.size == 1:
        return {name: _combine_alone(name, piece, deterministic, traffic) for name, piece in sorted(pieces.items())}
    headers = ranks.allgather({name: make_header(piece) for name, piece in pieces.items()})
    check_alike(headers, lambda name: ranks.allgather(_require_sums(pieces[name]).layout() if name in pieces else ()))
    kinds = {name: kind for each in headers for name, (kind, _, _) in each.items()}
    reduced = {} if deterministic else _find_audiences(headers)
    totals = _reduce(ranks, reduced, headers, pieces, traffic) if reduced else {}
    rest = {name: kind for name, kind in sorted(kinds.items()) if name not in reduced}
    gathered = _gather(ranks, rest, pieces, traffic) if rest else {}
    return dict(sorted({**totals, **gathered}.items())) if ranks.rank == 0 else None


def make_header(piece: Sums | Uploads) -> Header:
    """What the other ranks must know of a piece before it travels."""
    if isinstance(piece, Uploads):
        return "Uploads", tuple(piece.trees), len(piece.trees)
    return "Sums", tree.digest(piece.layout()), len(piece.simulated_bytes())


def check_alike(headers: Sequence[Mapping[str, Header]], layouts: Callable[[str], Sequence[SumLayout]]) -> None:
    """Refuse what the ranks bring under one name and cannot be combined; `layouts(name)` gives every rank's layout and is called only where digests differ.

    Raises: LayoutError naming both ranks, the first differing path and both shapes or types; or the client that uploads from two ranks.
    """
    for name in sorted(set().union(*headers)):
        brought = {rank: brought[name] for rank, brought in enumerate(headers) if name in brought}
        first, (kind, described, _) = next(iter(brought.items()))
        for rank, (other_kind, other_described, _) in brought.items():
            if other_kind != kind:
                raise LayoutError(f"rank {rank}: '{name}' is {other_kind}, rank {first} has {kind}; one name has one kind")
            if kind == "Sums" and other_described != described:
                found = layouts(name)
                path, got, want = find_difference(found[rank], found[first])
                raise LayoutError(f"rank {rank}: '{path}' of '{name}' is {got}, rank {first} has {want}; "
                                  "clients of one sum must share paths, shapes and types")
        if kind == "Uploads":
            _check_owners(name, {rank: clients for rank, (_, clients, _) in brought.items() if isinstance(clients, tuple)})


def _check_owners(name: str, clients: Mapping[int, Sequence[int]]) -> None:
    owners: dict[int, int] = {}
    for rank, mine in clients.items():
        for client in mine:
            if owners.setdefault(client, rank) != rank:
                raise LayoutError(f"rank {rank}: client {client} uploads '{name}' here and on rank {owners[client]}; a client lives on one rank")


def _combine_alone(name: str, piece: Sums | Uploads, deterministic: bool, traffic: Traffic) -> Total | Uploads:
    """What one rank has instead of a combination."""
    if isinstance(piece, Uploads):
        traffic.carry("gatherv", sum(map(tree.nbytes, piece.trees.values())))
        return _order_uploads([piece])
    if deterministic:
        traffic.carry("gatherv", sum(tree.nbytes(each) for _, _, each in _label(name, piece)))
        return piece.total()
    traffic.carry("reduce", count_payload_bytes(piece.layout()), make_header(piece)[2])
    return piece.take_total()


def _find_audiences(headers: Sequence[Mapping[str, Header]]) -> dict[str, Audience]:
    """Who takes part in the reduction of each name of Sums: the ranks that bring it, and rank 0."""
    ranks: dict[str, list[int]] = {}
    for rank, brought in enumerate(headers):
        for name, (kind, _, _) in brought.items():
            if kind == "Sums":
                ranks.setdefault(name, [0]).append(rank)
    return {name: tuple(sorted(set(found))) for name, found in ranks.items()}


def _reduce(ranks: Ranks, audiences: Mapping[str, Audience], headers: Sequence[Mapping[str, Header]], pieces: Pieces, traffic: Traffic) -> dict[str, Total]:
    """The Total of each name at rank 0, by reductions among its ranks."""
    sums = {name: _require_sums(pieces[name]) for name in audiences if name in pieces}
    layouts = {name: piece.layout() for name, piece in sums.items()}
    if any(name not in headers[0] for name in audiences):          # rank 0 hosts no such client: it learns from the others what the sum looks like
        told = ranks.gather({name: layout for name, layout in layouts.items() if name not in headers[0]})
        layouts = {name: layout for each in [*(told or []), layouts] for name, layout in each.items()}
    totals = {name: sums[name].take_total() if name in sums else Total.zero(layout) for name, layout in layouts.items()}
    for audience in sorted(set(audiences.values())):
        members, names = ranks.among(audience), [name for name in sorted(audiences) if audiences[name] == audience]
        if members is not None:
            _add_up(ranks, members, [(totals[name], layouts[name]) for name in names])
    for name, layout in layouts.items():
        if ranks.rank == 0:
            traffic.carry("reduce", count_payload_bytes(layout), sum(each[name][2] for each in headers if name in each))
        else:
            traffic.sent_bytes += count_payload_bytes(layout)
    return totals


def _add_up(ranks: Ranks, members: Any, sums: Sequence[tuple[Total, SumLayout]]) -> None:
    """Add what the other members of a communicator have to the Totals of rank 0; each has them all, of the same layouts."""
    leaves: dict[torch.dtype, list[Tensor]] = {}
    for total, layout in sums:
        for path, _, _, dtype in layout:
            leaves.setdefault(dtype, []).append(total.values[path].view(-1))
            leaves.setdefault(torch.float64, []).append(total.counts[path].view(-1))
    for dtype in sorted(leaves, key=str):
        for views in _cut_blocks(leaves[dtype], REDUCE_FLOATS):
            buffer = torch.zeros(sum(map(len, views)), dtype=dtype)
            slots = buffer.split([len(view) for view in views])
            if ranks.rank > 0:                                     # rank 0 brings zeros: its own sum is not to be rounded
                for slot, view in zip(slots, views, strict=True):
                    slot.copy_(view)
            ranks.reduce(buffer, members)
            if ranks.rank == 0:
                for slot, view in zip(slots, views, strict=True):
                    view.add_(slot)


def _require_sums(piece: Sums | Uploads) -> Sums:
    if isinstance(piece, Uploads):
        raise LayoutError("Uploads are here what other ranks have as Sums; one name has one kind")
    return piece


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


def _gather(ranks: Ranks, kinds: Mapping[str, str], pieces: Pieces, traffic: Traffic) -> Combined:
    """The Uploads of each name, and the Total of Sums that travel unsummed, at rank 0, by one Gatherv."""
    labelled = [each for name in kinds if name in pieces for each in _label(name, pieces[name])]
    trees = [each for _, _, each in labelled]
    traffic.carry("gatherv", sum(map(tree.nbytes, trees)))
    told = ranks.gather([(name, label, tree.layout(each)) for name, label, each in labelled])
    if ranks.rank > 0:
        ranks.gather_lines(packing.pack(trees))
        traffic.sent_bytes += sum(map(tree.nbytes, trees))
        return {}
    layouts = [[layout for _, _, layout in each] for each in told]
    lines = [0, *(sum(map(packing.count_lines, each)) for each in layouts[1:])]                # rank 0 need not send to itself
    arrived = packing.unpack(ranks.gather_lines(packing.pack([]), lines), list(chain.from_iterable(layouts[1:])))
    found: dict[str, list[Any]] = {name: [] for name in kinds}
    for (name, label, _), each in zip(chain.from_iterable(told), [*trees, *arrived], strict=True):
        found[name].append(_rebuild(label, each))
    return {name: _order_uploads(each) if kinds[name] == "Uploads" else Sums(tuple(each)).total() for name, each in found.items()}


def _label(name: str, piece: Sums | Uploads) -> list[tuple[str, Any, Tree]]:
    """The Trees of a piece, each with its name and its client, or the clients of a contribution."""
    if isinstance(piece, Uploads):
        return [(name, client, uploaded) for client, uploaded in piece.trees.items()]
    return [(name, contribution.clients, contribution.pack()) for contribution in piece.take_contributions()]


def _rebuild(label: Any, each: Tree) -> Contribution | Uploads:
    """What a Tree with this label was."""
    return Contribution.unpack(label, each) if isinstance(label, tuple) else Uploads({label: each})


def _order_uploads(uploads: Sequence[Uploads]) -> Uploads:
    """One Uploads of all, in host memory and in ascending client order."""
    merged = {client: uploaded for each in uploads for client, uploaded in each.trees.items()}
    return Uploads({client: tree.transform(merged[client], lambda leaf: leaf.detach().cpu()) for client in sorted(merged)})
