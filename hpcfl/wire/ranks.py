"""Ranks: the processes of a job as MPI connects them, or this one alone. The only file that imports mpi4py."""
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcfl.errors import EnvironmentFault
from hpcfl.wire.packing import LINE

AUDIENCES = 64                                                     # whose communicators are kept: MPI libraries have some thousands to give
Audience = tuple[int, ...]                                         # ranks, ascending, rank 0 among them


class Ranks:
    """The ranks of an mpi4py communicator: headers by lower-case calls (pickled), tensors by upper-case ones (buffers)."""

    def __init__(self, mpi: Any, ranks: Any) -> None:
        """`mpi` is the module mpi4py.MPI, `ranks` one of its intracommunicators."""
        self._mpi, self._ranks = mpi, ranks
        self._line = mpi.BYTE.Create_contiguous(LINE).Commit()
        self.rank: int = ranks.Get_rank()
        self.size: int = ranks.Get_size()
        self.library = mpi.Get_library_version().strip("\0\n ").split(",")[0]
        self.standard = "MPI {}.{}".format(*mpi.Get_version())
        node = ranks.Split_type(mpi.COMM_TYPE_SHARED)              # not the launcher's variables: under mpirun inside srun ranks inherit those of srun
        self.local_rank, self.local_size = node.Get_rank(), node.Get_size()
        node.Free()
        self._audiences: dict[Audience, Any] = {}                  # None where this rank is not of them; the last used comes last
        self.bcast, self.gather, self.allgather = ranks.bcast, ranks.gather, ranks.allgather
        self.send, self.barrier = ranks.send, ranks.Barrier

    def abort(self, code: int) -> None:
        """End all ranks at once with an exit code."""
        self._ranks.Abort(code)

    def receive(self, source: int) -> Any:
        """The object that `source` sent."""
        return self._ranks.recv(source=source)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self._ranks.allreduce(flag, op=self._mpi.LOR))

    def among(self, audience: Audience) -> Any:
        """The communicator of an audience, None at ranks that are not in it; called by all ranks, so that all free the same one when there are too many."""
        if len(audience) == self.size:
            return self._ranks
        if audience in self._audiences:
            found = self._audiences.pop(audience)
        else:
            found = self._ranks.Create_group(self._ranks.Get_group().Incl(audience)) if self.rank in audience else None
        self._audiences[audience] = found
        if len(self._audiences) > AUDIENCES:
            oldest = self._audiences.pop(next(iter(self._audiences)))
            if oldest is not None:
                oldest.Free()
        return found

    def bcast_lines(self, buffer: Tensor, ranks: Any) -> None:
        """Rank 0's buffer to the ranks of a communicator."""
        ranks.Bcast(self._lines(buffer), root=0)

    def gather_lines(self, buffer: Tensor, lines: Sequence[int] = ()) -> Tensor:
        """The buffers of all ranks one after the other, at rank 0; nothing elsewhere. Rank r brings `lines[r]` lines, which rank 0 alone must know."""
        if self.rank > 0:
            self._ranks.Gatherv(self._lines(buffer), None, root=0)
            return buffer[:0]
        whole = torch.empty(sum(lines) * LINE, dtype=torch.uint8)
        starts = [sum(lines[:rank]) for rank in range(self.size)]
        self._ranks.Gatherv(self._lines(buffer), [whole.numpy(), (lines, starts), self._line], root=0)
        return whole

    def send_lines(self, buffer: Tensor, rank: int) -> None:
        """A buffer to one rank."""
        self._ranks.Send(self._lines(buffer), dest=rank)

    def receive_lines(self, buffer: Tensor, source: int) -> None:
        """The buffer that `source` sent."""
        self._ranks.Recv(self._lines(buffer), source=source)

    def reduce(self, out: Tensor, ranks: Any) -> None:
        """out (n,) of rank 0 becomes the sum over the ranks of a communicator, in its own type."""
        here = (self._mpi.IN_PLACE, out.numpy()) if self.rank == 0 else (out.numpy(), None)
        ranks.Reduce(*here, op=self._mpi.SUM, root=0)

    def collectives(self, size: int) -> dict[str, Callable[[], object]]:
        """The collectives of a round by name, each of `size` bytes of every rank, a multiple of 8, in memory of its own."""
        own, of_all = torch.zeros(size // 8, dtype=torch.float64).numpy(), None
        if self.rank == 0:
            of_all = torch.zeros(size // 8 * self.size, dtype=torch.float64).numpy()
        total = None if of_all is None else of_all[:size // 8]
        return {"Bcast": lambda: self._ranks.Bcast(own, root=0), "Reduce": lambda: self._ranks.Reduce(own, total, op=self._mpi.SUM, root=0),
                "Gatherv": lambda: self._ranks.Gatherv(own, of_all, root=0)}

    def _lines(self, buffer: Tensor) -> list[Any]:
        return [buffer.numpy(), len(buffer) // LINE, self._line]


class Alone(Ranks):
    """The one rank of a process without MPI: it is never asked for what takes two."""

    def __init__(self) -> None:
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        self.library, self.standard = "no MPI library that mpi4py can load", ""

    def abort(self, code: int) -> None:
        """End this process at once with an exit code."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def find_ranks() -> Ranks:
    """All ranks that MPI knows; this process alone where mpi4py is not installed, or finds no library to load."""
    try:
        from mpi4py import MPI  # here, not above: importing it starts MPI
    except (ImportError, RuntimeError):
        return Alone()
    return Ranks(MPI, MPI.COMM_WORLD)


def carry(device: str) -> None:
    """Let MPI move tensors in the memory of a device from this process to itself; where MPI cannot, it raises or ends the process.

    Raises: EnvironmentFault where other bits arrive than were sent.
    """
    from mpi4py import MPI
    sent = torch.arange(1024, dtype=torch.float64, device=device)
    received, total = torch.zeros_like(sent), torch.zeros_like(sent)
    if sent.is_cuda:
        torch.cuda.synchronize(device)                             # MPI does not wait for the stream
    MPI.COMM_SELF.Sendrecv(sent, 0, recvbuf=received, source=0)
    MPI.COMM_SELF.Reduce(sent, total, op=MPI.SUM, root=0)
    if not (received.equal(sent) and total.equal(sent)):
        raise EnvironmentFault(f"what MPI moved between buffers on {device} did not arrive as it was sent")
