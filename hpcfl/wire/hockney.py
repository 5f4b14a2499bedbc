"""Hockney: what a collective takes: between the sizes that were timed, or on other ranks by the latency and the bandwidth that are fitted to them.

A message of n bytes between two ranks takes alpha + n beta seconds (Hockney, Parallel Computing 20, 1994), and a collective takes as many of these as
the steps of its algorithm say (Thakur, Rabenseifner and Gropp, International Journal of High Performance Computing Applications 19, 2005).
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

import numpy as np

SMALL_CALLS = 20                                                   # headers, barriers and agreements of a round ...
SMALL_BYTES = 8                                                    # ... each like a Bcast of so many bytes

Algorithm = tuple[float, float]                                    # (latencies, times that its bytes travel), one after the other


class Timing(TypedDict):
    """One collective of one size, timed on all ranks."""

    collective: str
    rank_bytes: int                                                # of each rank
    median_s: float                                                # over repetitions, of the slowest rank
    repetitions: int


@dataclass(frozen=True)
class Line:
    """The seconds of a message between two ranks: latency_s + bytes * byte_s."""

    latency_s: float
    byte_s: float

    def seconds(self, algorithms: Sequence[Algorithm], count: float) -> float:
        """Of a collective of `count` bytes by the quickest of its algorithms."""
        return min(latencies * self.latency_s + times * count * self.byte_s for latencies, times in algorithms)


def list_tree_algorithms(ranks: int) -> tuple[Algorithm, ...]:
    """The algorithms of Bcast and Reduce: whole messages along a binomial tree; or halves of halves, by scatter and allgather, reduce-scatter and gather."""
    levels = math.ceil(math.log2(ranks))
    return (levels, levels), (2 * levels, 2 * (ranks - 1) / ranks)


def list_root_algorithms(ranks: int) -> tuple[Algorithm, ...]:
    """The algorithm of Gatherv, and of messages between rank 0 and each of the others: one after the other at rank 0."""
    return ((ranks - 1, ranks - 1),)


ALGORITHMS: dict[str, Callable[[int], tuple[Algorithm, ...]]] = {"Bcast": list_tree_algorithms, "Reduce": list_tree_algorithms, "Gatherv": list_root_algorithms}


@dataclass(frozen=True)
class Wire:
    """What travels between the ranks, by collective, and where that is known from."""

    lines: dict[str, Line]
    source: str

    def seconds(self, collective: str, count: float, ranks: int) -> float:
        """Of a collective of `count` bytes of each rank; 0 where nothing travels."""
        return self.lines[collective].seconds(ALGORITHMS[collective](ranks), count) if ranks > 1 and count else 0.0


def fit_lines(timings: Sequence[Timing], ranks: int) -> tuple[dict[str, Line], float]:
    """The line of each collective that is nearest to what was timed on so many ranks, and the largest relative error that is left."""
    lines, worst = {}, 0.0
    for name, algorithms in ALGORITHMS.items():
        sizes, took = (np.array([timing[key] for timing in timings if timing["collective"] == name], float) for key in ("rank_bytes", "median_s"))
        lines[name] = fit_line(algorithms(ranks), sizes, took)
        worst = max(worst, *(abs(lines[name].seconds(algorithms(ranks), count) / each - 1) for count, each in zip(sizes, took, strict=True)))
    return lines, worst


def fit_line(algorithms: Sequence[Algorithm], sizes: np.ndarray, took: np.ndarray) -> Line:
    """The line that is nearest to what messages of these sizes took, (n,) both, by relative errors; every size by the algorithm that is quickest for it."""
    chosen = np.zeros(len(sizes), int)
    for _ in range(len(sizes) + 1):                                # each size changes its algorithm once at most, or two are alike
        latencies, times = np.array(algorithms)[chosen].T
        line = Line(*solve_non_negative(np.stack([latencies / took, times * sizes / took], 1)))
        chosen = np.argmin([a * line.latency_s + b * sizes * line.byte_s for a, b in algorithms], 0)
    return line


def solve_non_negative(columns: np.ndarray) -> tuple[float, float]:
    """x >= 0 with the least |A x - 1|^2, A (n, 2) >= 0."""
    both = np.linalg.lstsq(columns, np.ones(len(columns)))[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    one, other = columns.sum(0) / np.maximum((columns ** 2).sum(0), np.finfo(float).tiny)
    return min((float(one), 0.0), (0.0, float(other)), key=lambda x: ((columns @ x - 1) ** 2).sum())


def interpolate_seconds(timings: Sequence[Timing], collective: str, count: int) -> float:
    """Of a collective of `count` bytes of each rank, on the ranks that were timed: between two sizes on a straight line, beyond the largest in proportion.

    Nearer to what was timed than a fitted line, which must do for all sizes and numbers of ranks. 0 where nothing travels.
    """
    timed = [(timing["rank_bytes"], timing["median_s"]) for timing in timings if timing["collective"] == collective]
    if not timed or not count:
        return 0.0
    for (small, before), (large, after) in pairwise(timed):
        if count <= large:
            return before + (after - before) * max(0, count - small) / (large - small)
    largest, last = timed[-1]
    return last * max(1.0, count / largest)
