"""Ledger: what one rank did in the round that is open: seconds by kind of work and when, bytes and metrics by client."""
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from hpcfl.accounts import SECONDS

SHORTEST_S = 1e-5                                                  # of an interval that is remembered; the seconds count all of them


class Ledger:
    """Counts of the open round; `close` hands them over as a plain dict that pickles.

    What is booked between two rounds (a checkpoint) belongs to the later one.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._kinds: list[str] = []                                # of the blocks that are open, the innermost last
        self._since = 0.0
        self._first: float | None = None                           # when the first round began
        self.open()
        self._clear()

    def open(self) -> None:
        """Begin a round; where ranks are to agree on the time, all call it right behind a barrier."""
        self._start = time.perf_counter()                          # monotonic

    def _clear(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(SECONDS, 0.0)
        self._intervals: list[tuple[int, float, float]] = []       # (index in SECONDS, when it began, seconds)
        self._down: dict[int, int] = defaultdict(int)
        self._up: dict[int, int] = defaultdict(int)
        self._metrics: dict[str, dict[int, float]] = defaultdict(dict)
        self._notes: dict[str, float] = {}
        self._item_s = 0.0

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Book the seconds of the block, on CUDA until the device has finished; those of a block inside it belong to the inner one alone."""
        self._turn_over()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._turn_over()
            self._kinds.pop()

    def _turn_over(self) -> None:
        if self._kinds and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)                   # what is under way belongs to the block that began it
        now = time.perf_counter()
        if self._kinds:
            kind, duration = self._kinds[-1], now - self._since
            self._seconds[kind] += duration
            if duration >= SHORTEST_S:
                self._intervals.append((SECONDS.index(kind), self._since, duration))
        self._since = now

    def book_download(self, client: int, count: int) -> None:
        """Book bytes that a client's device would receive."""
        self._down[client] += count

    def book_uploads(self, by_client: Mapping[int, int]) -> None:
        """Book bytes that the clients' devices would send."""
        for client, count in by_client.items():
            self._up[client] += count

    def book_metrics(self, verb: str, clients: Sequence[int], metrics: Mapping[str, Tensor]) -> None:
        """Book one number per client for each metric; those of other verbs are kept apart from those of train by their prefix."""
        for name, values in metrics.items():
            self._metrics[_named(verb, name)].update(zip(clients, values.tolist(), strict=True))

    def book_costs(self, verb: str, clients: Sequence[int], costs: Mapping[str, Tensor]) -> None:
        """Book one cost per client under each name, as `measured`; those of all steps of a round under one verb add up."""
        for name, values in costs.items():
            booked = self._metrics[_named(verb, name)]
            booked.update((client, booked.get(client, 0.0) + value) for client, value in zip(clients, values.tolist(), strict=True))

    def book_help(self, items: int, seconds: float) -> None:
        """Book that so many items of spread work, perhaps none, took so long here: those of one item is what no number of ranks can shorten."""
        self._item_s += seconds / max(1, items)

    def note(self, name: str, value: float) -> None:
        """Book one number of the round that belongs to no client."""
        self._notes[name] = float(value)

    def so_far(self) -> tuple[float, dict[str, float]]:
        """Seconds since the round began, and those of each kind up to now, of the block that is open too; safe to ask from another thread."""
        now, seconds = time.perf_counter(), dict(self._seconds)
        for kind in self._kinds[-1:]:
            seconds[kind] += now - self._since
        return now - self._start, seconds

    def close(self) -> dict:
        """The round's account: {"wall_s", "opened_s", "intervals", "seconds", "down", "up", "metrics", "notes", "item_s"}.

        `opened_s`: when the round began, counted from the first one; `intervals`: what was done when, {"kind": (n,) index in SECONDS, "start_s": (n,)
        counted from the beginning of this round, "duration_s": (n,)}, in order of time and none of two kinds at once; `item_s`: of one item of each
        piece of spread work, the mean over those carried out here.
        """
        self._first = self._start if self._first is None else self._first
        kinds, starts, durations = zip(*self._intervals, strict=True) if self._intervals else ((), (), ())
        intervals = {"kind": np.array(kinds, np.uint8), "start_s": np.array(starts, np.float64) - self._start, "duration_s": np.array(durations, np.float32)}
        account = {"wall_s": time.perf_counter() - self._start, "opened_s": self._start - self._first, "intervals": intervals,
                   "seconds": self._seconds, "down": dict(self._down), "up": dict(self._up),
                   "metrics": {name: dict(values) for name, values in self._metrics.items()}, "notes": self._notes, "item_s": self._item_s}
        self._clear()
        self.open()                                                # what follows belongs to the next round, as long as nobody opens that
        return account


def _named(verb: str, name: str) -> str:
    return name if verb == "train" else f"{verb}_{name}"
