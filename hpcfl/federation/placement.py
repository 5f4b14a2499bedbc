"""Placement: which rank hosts which client, by expected or measured cost, largest first."""
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

HOSTS: dict[str, Callable[[int], range]] = {"shared": range, "dedicated": lambda ranks: range(min(1, ranks - 1), ranks)}        # R -> the ranks with clients


@dataclass(frozen=True)
class Past:
    """What a checkpoint says of the placement before it: the rank of each client, of how many, under which kind of server, and what each client took."""

    home: tuple[int, ...]                                          # (K,)
    ranks: int
    server: str
    seconds: tuple[float, ...]                                     # (K,) of a round; NaN where a client has not been at work


def place_clients(costs: Sequence[float], ranks: int, server: str = "shared") -> tuple[int, ...]:
    """The rank of each client, (K,): each client in order of falling cost goes to the rank with the least work so far (longest processing time first).

    costs: expected work per client in any one unit (training samples x model FLOPs). server = "dedicated" keeps rank 0 free of clients where there
    is another rank. A pure function: all ranks compute it and agree.
    """
    loads = [(0.0, rank) for rank in HOSTS[server](ranks)]         # a heap: the least loaded rank first, of equals the lowest
    home = [0] * len(costs)
    for client in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        load, home[client] = loads[0]
        heapq.heapreplace(loads, (load + costs[client], home[client]))
    return tuple(home)


def resettle(past: Past, costs: Sequence[float], ranks: int, server: str, deterministic: bool) -> tuple[int, ...]:
    """The rank of each client after a restart, (K,): by the seconds that were measured, or where it was if otherwise bits would change that must not.

    As many ranks as before add up in the same order only if each has the clients it had; `deterministic` sums do not depend on that. A pure function of the
    checkpoint, as `place`.
    """
    if not deterministic and (past.ranks, past.server) == (ranks, server):
        return past.home
    return place_clients(fill_in_seconds(costs, past.seconds), ranks, server)


def fill_in_seconds(costs: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Seconds of each client, (K,); of those that have none the expected costs at the rate of those that have."""
    known = [client for client, taken in enumerate(seconds) if math.isfinite(taken)]
    work = sum(costs[client] for client in known)
    rate = sum(seconds[client] for client in known) / work if work else 1.0
    return [taken if math.isfinite(taken) else rate * cost for taken, cost in zip(seconds, costs, strict=True)]
