"""Pace: when a checkpoint is due by the clock, so that an end that asks nobody (a launcher that kills its ranks, a power cut) costs little."""
import time
from collections.abc import Iterator
from contextlib import contextmanager

CHEAP = 20                                                         # what has taken this many times as long as its checkpoint is worth one: 5 % of the time


class Pace:
    """Seconds since the last checkpoint against `limit_s` and against what the last one took; a limit of 0 is no limit at all, and nothing is ever due."""

    def __init__(self, limit_s: float):
        self._limit_s, self._since, self._took_s = limit_s, time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        """Whether it is time; the first comes behind the first round, for nobody knows yet what it takes, and a disk that takes none shows early."""
        return self._limit_s > 0 and time.monotonic() - self._since >= min(self._limit_s, CHEAP * self._took_s)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside the block a checkpoint is written."""
        start = time.monotonic()
        yield
        self._since = time.monotonic()
        self._took_s = self._since - start
