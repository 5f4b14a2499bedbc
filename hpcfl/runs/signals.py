"""Signals that ask a run to stop: SIGUSR1, SIGTERM, SIGHUP and Ctrl-C; imports nothing that takes long, so that a run listens from its first moments on."""
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from hpcfl.wire.launchers import read_launch

OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)                     # stay ignored where whoever started this process ignores them: nohup, a script's &
NUMBERS = (signal.SIGUSR1, signal.SIGTERM, *OF_A_TERMINAL)
HEARD = b"hpcfl: Ctrl-C: the run stops behind the round that it is in, with a checkpoint; Ctrl-C again ends it at once\n"


def listen() -> Callable[[], bool]:
    """Whether one has come since now. From now on they end this process no more, and a second one changes nothing, but for a second Ctrl-C.

    That raises KeyboardInterrupt.
    """
    seen: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and number in seen
        seen.append(number)
        if again:
            raise KeyboardInterrupt
        if number == signal.SIGINT and getattr(read_launch(), "rank", 0) == 0:
            with suppress(OSError):
                os.write(2, HEARD)                                 # not by a stream: the signal may have come in the middle of one's work
    for number in NUMBERS:
        if number not in OF_A_TERMINAL or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, hear)
    return lambda: bool(seen)
