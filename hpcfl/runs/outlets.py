"""Outlets: standard output and error that may go away: what is only told there never ends what must be done."""
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)                                    # nobody reads any more: the pipe is closed, the terminal has hung up


class Outlet(io.FileIO):
    """A file that takes everything: from the first write that fails on it drops what it is given, and remembers why."""

    failure: OSError | None = None
    told = False                                                   # whether anybody has asked for the failure

    def write(self, content: Any) -> int:
        """Write, or drop; where there is no room for the moment only (a terminal in non-blocking mode) it waits."""
        while self.failure is None:
            try:
                written = super().write(content)
            except OSError as error:
                self.failure = error
            else:
                if written is not None:
                    return written
                select.select([], [self], [])
        return memoryview(content).nbytes


def open_all() -> None:
    """Have this process print to outlets; for the command line, before anything is printed.

    What was closed (`>&-`) leads nowhere: else the next file that is opened would take its number, and what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                         # takes the lowest number that is free, which is this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):                  # else somebody has put a stream of his own there
            setattr(sys, name, _open(number, stream))


def find_failure(stream: TextIO | None) -> OSError | None:
    """Why a stream has begun to drop what it is given; said once, and None where it does not or is no outlet."""
    outlet = getattr(getattr(stream, "buffer", None), "raw", None)
    if stream is None or not isinstance(outlet, Outlet):
        return None
    stream.flush()
    failure, outlet.told = None if outlet.told else outlet.failure, outlet.failure is not None
    return failure


def _open(number: int, stream: TextIO | None) -> TextIO:
    outlet = Outlet(number, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(outlet), getattr(stream, "encoding", None), errors="backslashreplace",        # what the locale lacks is told too
                            line_buffering=number == 2 or outlet.isatty())
