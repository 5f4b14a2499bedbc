"""Uplink: what clients send up: weighted sums and whole uploads that can be added in any order before the server looks at them."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpcfl.errors import LayoutError
from hpcfl.tree import Tree, digest, join, nbytes, part, select_floating, transform

Shape = tuple[int, ...]
SumLayout = tuple[tuple[str, Shape, Shape, torch.dtype], ...]      # (path, shape of the sum, shape of the count, type in which the sum travels), by path
Header = tuple[str, str | tuple[int, ...], int]                    # (kind, digest of the layout or clients, how many clients)
SUM_BLOCK = {"cpu": 1 << 14, "cuda": 1 << 24}                          # elements added at a time: of each client a cache's worth, or of all a kernel's


@dataclass(frozen=True)
class Total:
    """A finished weighted sum in float64: `values` = sum_k w_k x_k and `counts` = sum_k w_k, each count broadcastable to its value."""

    values: Tree
    counts: Tree

    @classmethod
    def view(cls, buffer: Tensor, layout: SumLayout) -> "Total":
        """The Total whose leaves are views of `buffer`, float64 (floats(layout),): all values, then all counts."""
        shapes = [shape for _, shape, _, _ in layout] + [shape for _, _, shape, _ in layout]
        leaves = [leaf.view(shape) for leaf, shape in zip(buffer.split([_numel(shape) for shape in shapes]), shapes, strict=True)]
        paths = [path for path, *_ in layout]
        return cls(dict(zip(paths, leaves[:len(paths)], strict=True)), dict(zip(paths, leaves[len(paths):], strict=True)))

    @classmethod
    def zero(cls, layout: SumLayout) -> "Total":
        """The Total of nobody."""
        return cls.view(torch.zeros(count_floats(layout), dtype=torch.float64), layout)

    def mean(self) -> Tree:
        """sum / count in float64, 0 where the count is 0: nobody had a say there, which `has` tells apart from a mean of 0."""
        return {path: torch.where(self.counts[path] > 0, value / self.counts[path], 0.0) for path, value in self.values.items()}

    def has(self) -> Tree:
        """Where anybody contributed: bool, of the counts' shapes."""
        return transform(self.counts, lambda count: count > 0)


@dataclass(frozen=True)
class Contribution:
    """What some clients give to a sum, not added yet: every leaf of `values` and of `weights` (float64) has the client axis (K, ...) in front."""

    clients: tuple[int, ...]
    values: Tree
    weights: Tree
    sent_bytes: int = 0                                            # per client, on a real network

    def pack(self) -> Tree:
        """Values and weights as one Tree, to travel unsummed."""
        return join(values=self.values, weights=self.weights)

    @classmethod
    def unpack(cls, clients: tuple[int, ...], tree: Tree) -> "Contribution":
        """The Contribution that `packed` made, without the count of bytes, which is taken where they leave."""
        return cls(clients, part(tree, "values"), part(tree, "weights"))


@dataclass(frozen=True)
class Sums:
    """A weighted sum over clients that is not carried out before `total`, or `reduced`.

    The contributions stay apart, so that they can be added in ascending client order whatever the order of `+`. A client of one rank may contribute
    more than once: its contributions are added in the order in which they came.
    """

    contributions: tuple[Contribution, ...]
    partial: tuple[Total, ...] = ()                                # what has been added up before these
    sent: tuple[Mapping[int, int], ...] = ()                       # client -> bytes of what is in `partial`; apart, for to merge them each time would be slow
    described: SumLayout = ()                                      # of `partial`, whose leaves do not tell what they were added from

    @classmethod
    def weighted(cls, clients: Sequence[int], values: Tree, weights: Tensor | Tree, weights_sent: bool = True, sent_bytes: int | None = None) -> "Sums":
        """The clients' values with their weights.

        values: path -> (K, ...), floating; weights: (K,) for all paths, or path -> (K, ...) aligned with the value from the left, so that (K, C)
        weighs the rows of (K, C, p). `weights_sent`: each weight counts 8 bytes of simulated traffic; False where the server can work them out.
        `sent_bytes`: what one client sends on a real network, where values and weights are not sent as they lie here.
        Raises: LayoutError for integer leaves, a client axis of another length, and weights that do not fit their value.
        """
        carried = values.keys() - select_floating(values).keys()
        if carried:
            raise LayoutError(f"'{min(carried)}' is {values[min(carried)].dtype}, wanted a floating type; integer buffers are carried, "
                              "never averaged: take tree.floating(...), or .double() for counts")
        shared = isinstance(weights, Tensor)
        named = dict.fromkeys(values, weights.detach().to(torch.float64)) if isinstance(weights, Tensor) else _align_weights(values, weights)
        for path, value in values.items():
            _check_fit(path, tuple(value.shape), tuple(named[path].shape), len(clients))
        each = 8 if shared else sum(8 * _numel(weight.shape[1:]) for weight in named.values())
        detached = transform(values, Tensor.detach)
        if sent_bytes is None:
            sent_bytes = nbytes(transform(detached, lambda leaf: leaf[:1])) + (each if weights_sent else 0)
        return cls((Contribution(tuple(int(client) for client in clients), detached, named, sent_bytes),))

    def layout(self) -> SumLayout:
        """What the total will look like."""
        if self.partial:
            return self.described
        first = self.contributions[0]
        return tuple((path, tuple(first.values[path].shape[1:]), tuple(first.weights[path].shape[1:]), choose_wire_type(first.values[path].dtype))
                     for path in sorted(first.values))

    def __add__(self, other: "Sums") -> "Sums":
        """Both, still unsummed. Raises LayoutError where paths, shapes or types differ."""
        if self.layout() != other.layout():
            path, got, want = find_difference(self.layout(), other.layout())
            raise LayoutError(f"cannot add Sums: '{path}' is {got} on one side, {want} on the other; clients of one sum must share paths, shapes and types")
        return Sums(self.contributions + other.contributions, self.partial + other.partial, self.sent + other.sent, self.described or other.described)

    def total(self) -> Total:
        """The sum, in float64 and in ascending client order: the same bits however the contributions were put together."""
        total = Total.zero(self.layout())
        self.add_to(total)
        return total

    def reduce(self) -> "Sums":
        """The same sum in the room of one total: nothing of a contribution is kept, and what is added later is added after it."""
        if not self.contributions and len(self.partial) == 1:
            return self
        return Sums((), (self.total(),), (*self.sent, self._own_bytes()), self.layout())

    def take_total(self) -> Total:
        """The total in the memory of a sum that is reduced: whoever adds to it uses that up."""
        return self.reduce().partial[0]

    def take_contributions(self) -> tuple[Contribution, ...]:
        """The contributions. Raises LayoutError where some are reduced already."""
        if self.partial:
            raise LayoutError(f"the sum of '{self.layout()[0][0]}' is reduced already; what is to be added in ascending client order must come unsummed")
        return self.contributions

    def add_to(self, out: Total) -> None:
        """Add partial sums and then every contribution to `out`, leaves in host memory, in ascending client order."""
        for path, value_out in out.values.items():
            for partial in self.partial:
                value_out.add_(partial.values[path])
                out.counts[path].add_(partial.counts[path])
        if not self.contributions:
            return
        clients = [client for contribution in self.contributions for client in contribution.clients]
        order = sorted(range(len(clients)), key=clients.__getitem__)                     # stable: a client's own contributions stay in order
        for path, value_out in out.values.items():
            values = [contribution.values[path] for contribution in self.contributions]
            weights = [contribution.weights[path] for contribution in self.contributions]
            factors = [_factors(weight, value) for weight, value in zip(weights, values, strict=True)]       # (K, 1) or (K, n)
            _add_products(value_out.view(-1), [_flat(value) for value in values], factors, order)
            _add_ordered(out.counts[path].view(-1), [row for weight in weights for row in _flat(weight.cpu()).unbind()], order)

    def simulated_bytes(self) -> dict[int, int]:
        """What each client would send on a real network, bytes; by default its values in their own type, and its weights where they are sent."""
        sent: dict[int, int] = {}
        for each in (*self.sent, self._own_bytes()):
            for client, count in each.items():
                sent[client] = sent.get(client, 0) + count
        return sent

    def _own_bytes(self) -> dict[int, int]:
        sent: dict[int, int] = {}
        for contribution in self.contributions:
            for client in contribution.clients:
                sent[client] = sent.get(client, 0) + contribution.sent_bytes
        return sent


@dataclass(frozen=True)
class Uploads:
    """Whole Trees, for servers that must see each client: {client: Tree}, layouts free to differ."""

    trees: Mapping[int, Tree]

    def __add__(self, other: "Uploads") -> "Uploads":
        """Both. Raises LayoutError where a client uploads twice."""
        twice = self.trees.keys() & other.trees.keys()
        if twice:
            raise LayoutError(f"client {min(twice)} uploads twice; one Tree per client and name, so use another name for the second")
        return Uploads({**self.trees, **other.trees})

    def simulated_bytes(self) -> dict[int, int]:
        """What each client would send on a real network, bytes."""
        return {client: nbytes(tree) for client, tree in self.trees.items()}


@dataclass(frozen=True)
class Uplink:
    """Named Sums and Uploads; `Uplink()` is the zero of `+`, and a name that one side lacks contributes nothing."""

    pieces: Mapping[str, Sums | Uploads] = field(default_factory=dict)

    def __add__(self, other: "Uplink") -> "Uplink":
        """Both, name by name. Raises LayoutError where one name is Sums here and Uploads there, or where layouts differ."""
        return Uplink({**self.pieces, **{name: _add(name, self.pieces.get(name), piece) for name, piece in other.pieces.items()}})

    def reduce(self) -> "Uplink":
        """The same with every sum in the room of one total; Uploads as they are."""
        return Uplink({name: piece.reduce() if isinstance(piece, Sums) else piece for name, piece in self.pieces.items()})

    def simulated_bytes(self) -> dict[int, int]:
        """What each client would send on a real network, bytes over all names."""
        sent: dict[int, int] = {}
        for piece in self.pieces.values():
            sent = _add_bytes(sent, piece.simulated_bytes())
        return sent


def count_floats(layout: SumLayout) -> int:
    """How many float64 numbers a Total of this layout has."""
    return sum(_numel(value) + _numel(count) for _, value, count, _ in layout)


def choose_wire_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which the sum of leaves of a type travels: their own, but never half precision."""
    return torch.promote_types(dtype, torch.float32)


def count_payload_bytes(layout: SumLayout) -> int:
    """Bytes of a Total as it travels: the sums in their own types, the counts in float64."""
    return sum(_numel(value) * dtype.itemsize + 8 * _numel(count) for _, value, count, dtype in layout)


def find_difference(one: SumLayout, other: SumLayout) -> tuple[str, str, str]:
    """The first path in which two layouts differ, with what it is in either: as far as that tells them apart shapes, those of counts, types; or 'absent'."""
    here, there = ({path: described for path, *described in layout} for layout in (one, other))
    path = next(path for path in sorted(here.keys() | there.keys()) if here.get(path) != there.get(path))
    return path, _words(here.get(path), there.get(path)), _words(there.get(path), here.get(path))


def make_header(piece: Sums | Uploads) -> Header:
    """What other ranks must know of it before it travels."""
    if isinstance(piece, Uploads):
        return "Uploads", tuple(piece.trees), len(piece.trees)
    return "Sums", digest(piece.layout()), len(piece.simulated_bytes())


def check_alike(headers: Sequence[Mapping[str, Header]], layouts: Callable[[str], Sequence[SumLayout]]) -> None:
    """Whether what the ranks bring under each name can be combined; `layouts(name)` is asked, for every rank's, only where digests differ.

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


def _words(described: Sequence[Any] | None, other: Sequence[Any] | None) -> str:
    if described is None:
        return "absent"
    value, count, dtype = described
    if other is None or other[0] != value:
        return str(value)
    return f"{value} with counts {count}" if other[1] != count else f"{value} in {dtype}"


def _add_bytes(one: Mapping[int, int], other: Mapping[int, int]) -> dict[int, int]:
    return {**one, **{client: one.get(client, 0) + count for client, count in other.items()}}


def _add(name: str, one: Sums | Uploads | None, other: Sums | Uploads) -> Sums | Uploads:
    if one is None:
        return other
    if isinstance(one, Sums) and isinstance(other, Sums):
        return one + other
    if isinstance(one, Uploads) and isinstance(other, Uploads):
        return one + other
    raise LayoutError(f"'{name}' is {type(one).__name__} on one side, {type(other).__name__} on the other; one name has one kind")


def _align_weights(values: Tree, weights: Tree) -> Tree:
    missing = values.keys() - weights.keys()
    if missing:
        raise LayoutError(f"'{min(missing)}' has a value but no weight; give one weight per path, or one Tensor (K,) for all")
    aligned = {}
    for path, value in values.items():
        weight = weights[path].detach().to(torch.float64)
        aligned[path] = weight if weight.dim() <= 1 else weight.view(*weight.shape, *[1] * (value.dim() - weight.dim()))
    return aligned


def _check_fit(path: str, value: Shape, weight: Shape, clients: int) -> None:
    if value[:1] != (clients,) or weight[:1] != (clients,):
        raise LayoutError(f"'{path}': value is {value}, weight {weight}, wanted a client axis of length {clients} in front of both")
    if len(weight) > len(value) or any(size not in (1, full) for size, full in zip(weight[1:], value[1:], strict=False)):
        raise LayoutError(f"'{path}': weight {weight} does not broadcast to value {value}; align it from the left, with 1 where it repeats")


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _flat(stacked: Tensor) -> Tensor:
    return stacked.reshape(len(stacked), _numel(stacked.shape[1:]))


def _factors(weight: Tensor, value: Tensor) -> Tensor:
    return weight[:, None] if weight.dim() == 1 else _flat(weight.expand_as(value))


def _add_products(out: Tensor, values: Sequence[Tensor], weights: Sequence[Tensor], order: Sequence[int]) -> None:
    """out (n,) += sum of weight * value over the rows of all (K, n) in `order`, one block of columns at a time so that it stays in the cache.

    Product and sum are separate operations: a fused one rounds differently at the ends of vectors, and the bits would depend on the threads.
    """
    device = values[0].device
    target = out if device.type == "cpu" else torch.zeros(out.shape, dtype=torch.float64, device=device)
    pairs = [(value, weight.to(device)) for value, weight in zip(values, weights, strict=True)]
    size = max(1, SUM_BLOCK[device.type] // (len(order) if device.type == "cuda" else 1))
    for start in range(0, len(out), size):
        block = slice(start, start + size)
        products = [row for value, weight in pairs
                    for row in value[:, block].to(device, torch.float64, copy=True).mul_(weight if weight.shape[1] == 1 else weight[:, block])]
        _add_ordered(target[block], products, order)
    if target is not out:
        out.add_(target.cpu())


def _add_ordered(out: Tensor, rows: Sequence[Tensor], order: Sequence[int]) -> None:
    for index in order:
        out.add_(rows[index])
