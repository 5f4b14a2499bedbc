"""Signals: SIGUSR1 and SIGTERM ask a run to stop; imports nothing that takes long, so that a run listens from its first moments on."""
import signal
from collections.abc import Callable

NUMBERS = (signal.SIGUSR1, signal.SIGTERM)


def listen() -> Callable[[], bool]:
    """Whether one has come since now. From now on they end this process no more, and a second one changes nothing."""
    seen: list[int] = []
    for number in NUMBERS:
        signal.signal(number, lambda got, frame: seen.append(got))
    return lambda: bool(seen)
