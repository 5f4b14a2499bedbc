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

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Book the seconds of the block; on CUDA until the device has finished."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._seconds[kind] += time.perf_counter() - start

    def downloaded(self, client: int, count: int) -> None:
        """Book bytes that a client's device would receive."""
        self._down[client] += count

    def uploaded(self, by_client: Mapping[int, int]) -> None:
        """Book bytes that the clients' devices would send."""
        for client, count in by_client.items():
            self._up[client] += count

    def measured(self, verb: str, clients: Sequence[int], metrics: Mapping[str, Tensor]) -> None:
        """Book one number per client for each metric; those of refine are kept apart from those of train by their prefix."""
        for name, values in metrics.items():
            name = name if verb == "train" else f"{verb}_{name}"
            self._metrics[name].update(zip(clients, values.tolist(), strict=True))

    def close(self) -> dict:
        """The round's account: {"wall_s", "seconds", "down", "up", "metrics"}."""
        account = {"wall_s": time.perf_counter() - self._start, "seconds": self._seconds, "down": dict(self._down), "up": dict(self._up),
                   "metrics": {name: dict(values) for name, values in self._metrics.items()}}
        self._clear()
        return account
