"""Ledger: what one rank did in the round that is open: seconds by kind of work, bytes and metrics by client."""
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

SECONDS = ("train", "idle", "combine", "aggregate", "publish", "refine", "evaluate", "checkpoint")


class Ledger:
    """Counts of the open round; `close` hands them over as a plain dict that pickles.

    What is booked between two rounds (a checkpoint) belongs to the later one.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._kinds: list[str] = []                                # of the blocks that are open, the innermost last
        self._since = 0.0
        self.open()
        self._clear()

    def open(self) -> None:
        """Begin a round."""
        self._start = time.perf_counter()

    def _clear(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(SECONDS, 0.0)
        self._down: dict[int, int] = defaultdict(int)
        self._up: dict[int, int] = defaultdict(int)
        self._metrics: dict[str, dict[int, float]] = defaultdict(dict)
        self._notes: dict[str, float] = {}

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Book the seconds of the block, on CUDA until the device has finished; those of a block inside it belong to the inner one alone."""
        self._turn_over()
        self._kinds.append(kind)
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._turn_over()
            self._kinds.pop()

    def _turn_over(self) -> None:
        now = time.perf_counter()
        if self._kinds:
            self._seconds[self._kinds[-1]] += now - self._since
        self._since = now

    def downloaded(self, client: int, count: int) -> None:
        """Book bytes that a client's device would receive."""
        self._down[client] += count

    def uploaded(self, by_client: Mapping[int, int]) -> None:
        """Book bytes that the clients' devices would send."""
        for client, count in by_client.items():
            self._up[client] += count

    def measured(self, verb: str, clients: Sequence[int], metrics: Mapping[str, Tensor]) -> None:
        """Book one number per client for each metric; those of other verbs are kept apart from those of train by their prefix."""
        for name, values in metrics.items():
            self._metrics[_named(verb, name)].update(zip(clients, values.tolist(), strict=True))

    def spent(self, verb: str, clients: Sequence[int], costs: Mapping[str, Tensor]) -> None:
        """Book one cost per client under each name, as `measured`; those of all steps of a round under one verb add up."""
        for name, values in costs.items():
            booked = self._metrics[_named(verb, name)]
            booked.update((client, booked.get(client, 0.0) + value) for client, value in zip(clients, values.tolist(), strict=True))

    def note(self, name: str, value: float) -> None:
        """Book one number of the round that belongs to no client."""
        self._notes[name] = float(value)

    def close(self) -> dict:
        """The round's account: {"wall_s", "seconds", "down", "up", "metrics", "notes"}."""
        account = {"wall_s": time.perf_counter() - self._start, "seconds": self._seconds, "down": dict(self._down), "up": dict(self._up),
                   "metrics": {name: dict(values) for name, values in self._metrics.items()}, "notes": self._notes}
        self._clear()
        return account


def _named(verb: str, name: str) -> str:
    return name if verb == "train" else f"{verb}_{name}"
