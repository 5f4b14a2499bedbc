"""Conditions: which clients of a cohort answer in a round, and when, as a job simulates it; pure functions of the seed and the round."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hpcfl.settings.sections import Federation
from hpcfl.streams import Stream

DELAYS: dict[str, Callable[[np.random.Generator, int, Federation], np.ndarray]] = {     # (K,) simulated seconds of mean federation.delay_mean
    "exponential": lambda generator, clients, settings: generator.exponential(settings.delay_mean, clients),
    "lognormal": lambda generator, clients, settings: generator.lognormal(
        np.log(settings.delay_mean) - settings.delay_spread ** 2 / 2, settings.delay_spread, clients)}


@dataclass(frozen=True)
class Answers:
    """What came of asking a cohort: who answered in time, after how many simulated seconds, and when the round ended for the server.

    A client that dropped out has no delay; one that has a delay and did not answer was late. `simulated`: whether anything could go missing at all.
    """

    cohort: tuple[int, ...]
    answered: tuple[int, ...]
    delays_s: dict[int, float] = field(default_factory=dict)
    duration_s: float = 0.0
    simulated: bool = False

    @property
    def lost(self) -> tuple[int, ...]:
        """Those who were asked and did not answer."""
        answered = set(self.answered)
        return tuple(client for client in self.cohort if client not in answered)


def simulate_answers(settings: Federation, stream: Callable[[str], Stream], cohort: Sequence[int]) -> Answers:
    """The answers of a cohort, `stream` being the round's streams by purpose; what a client does does not depend on who else is asked.

    The server waits for the last of those who answer, and if anybody is missing until the deadline, where there is one.
    """
    gone = stream("dropout").numpy().random(settings.clients) < settings.dropout                                                     # (K,)
    draw = DELAYS.get(settings.delay)
    seconds = draw(stream("delay").numpy(), settings.clients, settings) if draw else np.zeros(settings.clients)                      # (K,)
    delays = {client: float(seconds[client]) for client in cohort if not gone[client]}
    answered = tuple(client for client, delay in delays.items() if not settings.deadline or delay <= settings.deadline)
    waits = settings.deadline and len(answered) < len(cohort)
    return Answers(tuple(cohort), answered, delays, settings.deadline if waits else max((delays[client] for client in answered), default=0.0), simulated=True)
