"""One verdict for all ranks: a test that fails on one rank fails on each, so that no rank walks on alone into the next collective."""
from hpcfl.wire.communicator import Communicator


def mpi_assert(comm: Communicator, holds: bool, message: str = "") -> None:
    """Fail on every rank where `holds` is false on any, naming the ranks."""
    verdicts = comm.share(comm.gather((bool(holds), message)))
    failed = [f"rank {rank}: {text or 'does not hold'}" for rank, (good, text) in enumerate(verdicts) if not good]
    assert not failed, "\n".join(failed)
