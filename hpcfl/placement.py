"""Placement: which rank hosts which client, by expected cost, largest first."""
from collections.abc import Sequence


def place(costs: Sequence[float], ranks: int, server: str = "shared") -> tuple[int, ...]:
    """The rank of each client, (K,): each client in order of falling cost goes to the rank with the least work so far (longest processing time first).

    costs: expected work per client in any one unit (training samples x model FLOPs). server = "dedicated" keeps rank 0 free of clients where there
    is another rank. A pure function: all ranks compute it and agree.
    """
    hosts = list(range(1, ranks)) if server == "dedicated" and ranks > 1 else list(range(ranks))
    load = dict.fromkeys(hosts, 0.0)
    home = [0] * len(costs)
    for client in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        home[client] = min(hosts, key=lambda rank: (load[rank], rank))
        load[home[client]] += costs[client]
    return tuple(home)
