"""Partition: who owns which training images, as a pure function of the labels, the [data] section and the seed."""
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hpcfl.errors import DataError
from hpcfl.settings.sections import Data
from hpcfl.streams import Stream

TRIES = 10_000                                                     # redraws (0.2 ms each for 100 clients) before a floor counts as out of reach


@dataclass(frozen=True, eq=False)
class Partition:
    """Indices into the official training set, ascending int64 arrays that share no index.

    `train`, `validation` and `test` have one array per client; `public` and `public_validation` belong to the server.
    """

    train: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    public: np.ndarray
    public_validation: np.ndarray

    def counts(self, labels: np.ndarray, classes: int, split: str = "train") -> np.ndarray:
        """How many images of each class each client has in a part ("train", "validation" or "test"), (K, C) int64."""
        return np.stack([np.bincount(labels[indices], minlength=classes) for indices in getattr(self, split)]).astype(np.int64)


def partition_samples(labels: np.ndarray, clients: int, data: Data, seed: int) -> Partition:
    """Deal the training set with labels (N,) to the clients and the server.

    In order: the federation owns the share `fraction`; the server takes `public_fraction` of it, of which the share `validation` only selects; the
    rest goes to the clients by `data.partition`; each client keeps the shares `test` and `validation` of its shard apart. Every share is drawn
    evenly over the classes. A class that no client has is allowed.

    Raises: DataError for what cannot be: more clients than images, a floor out of reach, an empty shard (naming the client).
    """
    labels, stream = np.asarray(labels), Stream(seed, "partition")
    owned, _ = _carve(labels, np.arange(len(labels)), round(data.fraction * len(labels)), stream.branch("fraction"))
    public, private = _carve(labels, owned, round(data.public_fraction * len(owned)), stream.branch("public"))
    public_validation, public = _carve(labels, public, round(data.validation_fraction * len(public)), stream.branch("public validation"))
    if data.public_fraction > 0 and len(public) == 0:
        raise DataError(f"data.public_fraction = {data.public_fraction:g} of {len(owned)} images leaves the server none; raise it or data.fraction")
    if clients > len(private):
        raise DataError(f"{clients} clients share {len(private)} images; wanted one each at least: fewer federation.clients or more data.fraction")
    dealt = SCHEMES[data.partition](labels[private], clients, data, stream.branch("clients").numpy())
    parts = [_divide_holding(labels, private[positions], client, data, stream) for client, positions in enumerate(dealt)]
    train, validation, test = zip(*parts, strict=True)
    return Partition(train, validation, test, public, public_validation)


def _divide_holding(labels: np.ndarray, shard: np.ndarray, client: int, data: Data, stream: Stream) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One client's training, validation and test indices."""
    own, total = replace(stream.branch("holdings"), client=client), len(shard)
    test, rest = _carve(labels, shard, round(data.test_fraction * total), own.branch("test"))
    validation, train = _carve(labels, rest, min(len(rest), round(data.validation_fraction * total)), own.branch("validation"))
    if len(train) == 0:
        raise DataError(f"client {client} has {len(shard)} images, {len(test)} for test and {len(validation)} for validation, so none to train on; "
                        "use fewer clients, a milder data.partition, or smaller data.test_fraction and data.validation_fraction")
    return train, validation, test


def _carve(labels: np.ndarray, indices: np.ndarray, count: int, stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """`count` random ones of the indices and the rest, both ascending; every class gives its share to within one image."""
    generator, total = stream.numpy(), len(indices)
    shuffled = generator.permutation(indices)
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
    chosen = np.zeros(total, dtype=bool)
    if count:
        chosen[(np.arange(count) * total + generator.integers(total)) // count] = True               # evenly spaced from a random start
    return np.sort(ordered[chosen]), np.sort(ordered[~chosen])


def _iid(labels: np.ndarray, clients: int, data: Data, generator: np.random.Generator) -> list[np.ndarray]:
    """Equal shards (to within one image) of a random order."""
    return np.array_split(generator.permutation(len(labels)), clients)


def _dirichlet(labels: np.ndarray, clients: int, data: Data, generator: np.random.Generator) -> list[np.ndarray]:
    """Each class is divided by its own draw from Dir(alpha) over the clients (Yurochkin et al., arXiv 1905.12022)."""
    _reachable(len(labels), clients, data)
    members = [generator.permutation(np.flatnonzero(labels == y)) for y in np.unique(labels)]
    totals = np.array([len(member) for member in members])                         # (C,)

    def draw() -> np.ndarray:
        shares = generator.dirichlet(np.full(clients, data.alpha), size=len(members))                # (C, K)
        return _find_cuts(shares, totals)
    cuts = _redraw(draw, clients, data, f"data.alpha = {data.alpha:g}", "raise data.alpha")
    pieces = [np.split(member, cut[:-1]) for member, cut in zip(members, cuts, strict=True)]
    return [np.concatenate([piece[client] for piece in pieces]) for client in range(clients)]


def _shards(labels: np.ndarray, clients: int, data: Data, generator: np.random.Generator) -> list[np.ndarray]:
    """Images in order of class, cut into clients x classes_per_client equal pieces, equally many to each client.

    Source: McMahan et al., arXiv 1602.05629. A piece that straddles two classes brings a client one class more.
    """
    pieces = clients * data.classes_per_client
    if pieces > len(labels):
        raise DataError(f"data.partition = 'shards' cuts {len(labels)} images into {clients} clients x {data.classes_per_client} classes_per_client "
                        f"= {pieces} pieces, some of them empty; use fewer clients or fewer data.classes_per_client")
    shuffled = generator.permutation(len(labels))
    cut = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], pieces)
    hands = generator.permutation(pieces).reshape(clients, data.classes_per_client)
    return [np.concatenate([cut[piece] for piece in hand]) for hand in hands]


def _disjoint(labels: np.ndarray, clients: int, data: Data, generator: np.random.Generator) -> list[np.ndarray]:
    """Every class belongs to one client, with all its images; the numbers of classes differ by at most one."""
    classes = generator.permutation(np.unique(labels))
    if clients > len(classes):
        raise DataError(f"data.partition = 'disjoint' deals {len(classes)} classes to {clients} clients, so client {len(classes)} has none; "
                        f"wanted at most {len(classes)} federation.clients, or another data.partition")
    return [np.flatnonzero(np.isin(labels, own)) for own in np.array_split(classes, clients)]


def _lognormal(labels: np.ndarray, clients: int, data: Data, generator: np.random.Generator) -> list[np.ndarray]:
    """Shards of a random order whose sizes are proportional to exp(spread * N(0, 1)): unequal amounts, equal distributions."""
    _reachable(len(labels), clients, data)

    def draw() -> np.ndarray:
        logs = data.spread * generator.standard_normal(clients)
        weights = np.exp(logs - logs.max())                        # (K,)
        return _find_cuts((weights / weights.sum())[None], np.array([len(labels)]))
    cuts = _redraw(draw, clients, data, f"data.spread = {data.spread:g}", "lower data.spread")
    return np.split(generator.permutation(len(labels)), cuts[0, :-1])


def _find_cuts(shares: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Where to cut rows of `totals` (C,) items by shares (C, K) that sum to one: ends of the pieces, (C, K) int64."""
    cuts = np.floor(np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
    cuts[:, -1] = totals
    return np.minimum(cuts, totals[:, None])                       # a cumulative sum may exceed one by rounding


def _redraw(draw: Callable[[], np.ndarray], clients: int, data: Data, setting: str, way_out: str) -> np.ndarray:
    """Draw whole partitions until every client has the floor (Li et al., arXiv 2102.02079)."""
    best, poorest = -1, 0
    for _ in range(TRIES):
        cuts = draw()
        sizes = np.diff(cuts, prepend=0, axis=1).sum(axis=0)       # (K,)
        if sizes.min() >= data.minimum:
            return cuts
        if sizes.min() > best:
            best, poorest = int(sizes.min()), int(sizes.argmin())
    raise DataError(f"data.partition = '{data.partition}' with {setting}: in {TRIES} draws for {clients} clients the smallest shard never reached "
                    f"data.minimum = {data.minimum} (the best draw left client {poorest} with {best} images); "
                    f"{way_out}, lower data.minimum, or use fewer clients")


def _reachable(total: int, clients: int, data: Data) -> None:
    if clients * data.minimum > total:
        raise DataError(f"{clients} clients with data.minimum = {data.minimum} images each need {clients * data.minimum}, there are {total}; "
                        "lower data.minimum, use fewer clients, or raise data.fraction")


SCHEMES = {"iid": _iid, "dirichlet": _dirichlet, "shards": _shards, "disjoint": _disjoint, "lognormal": _lognormal}
