"""The processes of a job: how they number themselves, meet in parts, reduce, and end together."""
import os
import subprocess
import sys

import pytest
import torch

from hpcfl.wire import ranks
from hpcfl.wire.communicator import connect
from hpcfl.wire.ranks import Alone, find_ranks
from tests.support.verdict import mpi_assert


def test_abort_ends_the_process_with_the_code():
    code = "from hpcfl.wire.communicator import Alone, Communicator\ntry:\n    Communicator(Alone()).abort(6)\nfinally:\n    print('went on')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 6 and "went on" not in ended.stdout, ended.stderr


@pytest.mark.mpi(min_size=3)
def test_there_may_be_more_parts_of_the_ranks_than_communicators_are_kept(monkeypatch):
    monkeypatch.setattr(ranks, "AUDIENCES", 1)
    comm = connect()
    for turn in range(6):
        other = 1 + turn % (comm.size - 1)
        received = comm.distribute({(0, other): {"turn": torch.tensor(turn)}})
        mpi_assert(comm, (comm.rank not in (0, other) and received == {}) or int(received["turn"]) == turn, f"{turn}: {received}")


@pytest.mark.mpi(min_size=2)
def test_local_ranks_number_the_ranks_of_a_host():
    comm = connect()
    hosts = comm.share(comm.gather((os.uname().nodename, comm.local_rank, comm.local_size)))
    local = [number for host, number, _ in hosts if host == os.uname().nodename]
    mpi_assert(comm, sorted(local) == list(range(comm.local_size)), f"{hosts}")


def test_a_process_without_mpi_is_a_rank_of_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    found = find_ranks()
    assert isinstance(found, Alone) and (found.rank, found.size, found.local_rank, found.local_size) == (0, 1, 0, 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_arrives_at_rank_0_in_its_own_type_and_the_others_keep_theirs(dtype):
    comm, found = connect(), find_ranks()
    out = torch.full((3,), float(found.rank + 1), dtype=dtype)
    found.reduce(out, found.among(tuple(range(found.size))))
    wanted = found.size * (found.size + 1) / 2 if found.rank == 0 else found.rank + 1
    mpi_assert(comm, out.dtype == dtype and out.tolist() == [wanted] * 3, f"{out}")


@pytest.mark.mpi(min_size=2)
def test_whole_lines_are_gathered_in_rank_order():
    comm, found = connect(), find_ranks()
    whole = found.gather_lines(torch.full((ranks.LINE * found.rank,), found.rank, dtype=torch.uint8), range(found.size))
    wanted = [rank for rank in range(found.size) for _ in range(ranks.LINE * rank)]
    mpi_assert(comm, not len(whole) if found.rank else whole.tolist() == wanted, f"{whole}")
