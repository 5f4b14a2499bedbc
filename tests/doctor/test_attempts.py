"""Whatever a rank's attempt raises becomes words, which rank 0 learns from all ranks at once."""
import pytest

from hpcfl.doctor.attempts import attempt, gather_attempts
from hpcfl.errors import CheckpointError
from hpcfl.wire.communicator import Alone, Communicator, connect
from tests.support.verdict import mpi_assert


def test_whatever_is_raised_becomes_words():
    def fail(error: Exception) -> None:
        raise error
    assert attempt(fail, CheckpointError("as it is")) == (None, "as it is") and attempt(fail, KeyError("x")) == (None, "KeyError: 'x'")
    assert attempt(divmod, 7, 2) == ((3, 1), "")


def test_one_rank_gathers_its_own_attempt():
    assert gather_attempts(Communicator(Alone()), "found", "") == (["found"], {})
    assert gather_attempts(Communicator(Alone()), None, "broken") == ([], {0: "broken"})


@pytest.mark.mpi(min_size=2)
def test_the_server_learns_who_failed_and_the_others_learn_nothing():
    comm = connect()
    found = gather_attempts(comm, comm.rank, "broken" if comm.rank == comm.size - 1 else "")
    mpi_assert(comm, found == ((list(range(comm.size - 1)), {comm.size - 1: "broken"}) if comm.is_server else ([], {})), f"{found}")
