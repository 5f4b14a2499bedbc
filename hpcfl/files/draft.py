"""Draft: a file in the making that takes every write, so that HDF5 can be told of a full disk when it is safe."""
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class Draft(io.RawIOBase):
    """A file in the making, which takes every write and remembers whether the disk did.

    HDF5 crashes when it closes a file that it could not write. So what the disk refuses, and all that follows, is kept in memory, where HDF5 finds it again,
    until somebody asks `check`; whoever writes much asks often, and is told there.
    """

    def __init__(self, path: Path, otherwise: Callable[[OSError], Exception]):
        """`otherwise`: the error to raise for what the disk says. Raises it where no file can be made there."""
        self.path, self._otherwise = path, otherwise
        self._place = self._size = 0
        self._refused: OSError | None = None
        self._kept: list[tuple[int, bytes]] = []                   # where, and what, since the disk refused
        with self.telling():
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def check(self) -> None:
        """Raises what `otherwise` makes of the first write that the disk refused."""
        with self.telling():
            if self._refused:
                raise self._refused

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Raises what `otherwise` makes of an OSError of the block, which does nothing but ask the disk for something."""
        try:
            yield
        except OSError as error:
            raise self._otherwise(error) from error

    def close(self) -> None:
        if not self.closed:
            with suppress(OSError):                                # what mattered was told before
                os.close(self._handle)
        super().close()

    def write(self, content: Any) -> int:
        rest, place = memoryview(content).cast("B"), self._place
        self._place += len(rest)
        self._size = max(self._size, self._place)
        taken = len(rest)
        try:
            while rest and not self._refused:                      # one call moves at most 2 GiB, and what fits on a disk that becomes full
                moved = os.pwrite(self._handle, rest, place)
                if not moved:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                rest, place = rest[moved:], place + moved
        except OSError as error:
            self._refused = error
        if rest:
            self._kept.append((place, bytes(rest)))
        return taken

    def readinto(self, buffer: Any) -> int:
        out = memoryview(buffer).cast("B")
        wanted = max(0, min(len(out), self._size - self._place))
        try:
            out[:wanted] = os.pread(self._handle, wanted, self._place).ljust(wanted, b"\0")
        except OSError as error:
            self._refused = error
        for place, content in self._kept:
            first, last = max(place, self._place), min(place + len(content), self._place + wanted)
            if first < last:
                out[first - self._place:last - self._place] = content[first - place:last - place]
        self._place += wanted
        return wanted

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def truncate(self, size: int | None = None) -> int:
        self._size = self._place if size is None else size
        try:
            if not self._refused:
                os.ftruncate(self._handle, self._size)
        except OSError as error:
            self._refused = error
        return self._size

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
