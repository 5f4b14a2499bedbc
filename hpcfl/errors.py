"""Errors of hpcfl as types: each says what, where, got, wanted and the way out, and knows the exit code of the process."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AT = "at "                                                         # begins the note in which `note_whom` names a client


class HpcflError(Exception):
    """Base of all errors that hpcfl raises on purpose; `exit_code` is what the process ends with."""

    exit_code = 1


class JobError(HpcflError):
    """A job file or a command line that cannot be carried out as written."""

    exit_code = 2


class EnvironmentFault(HpcflError):
    """The machine or the launcher is not what the run needs (launcher mismatch, no GPU, no MPI library)."""

    exit_code = 3


class DataError(HpcflError):
    """A data set that is missing, damaged, or cannot be partitioned as asked."""

    exit_code = 4


class CheckpointError(HpcflError):
    """A checkpoint or a record that cannot be written, read or trusted."""

    exit_code = 5


class TrainingError(HpcflError):
    """Training did not reach what it must reach; the message names client, round and phase."""

    exit_code = 6


class NonFiniteError(TrainingError):
    """Training produced NaN or infinity; the message names client, round and phase."""


class RankMissing(HpcflError):
    """A rank did not arrive where the others waited for it, within the time that the job allows."""

    exit_code = 7


class LayoutError(HpcflError):
    """Trees, Groups, modules or what a verb gave do not fit each other in paths, shapes or types."""


class Stopped(HpcflError):
    """A signal asked the run to stop; a checkpoint lies behind it and the job may be requeued."""

    exit_code = 75


class Interrupted(HpcflError):
    """Somebody at the keyboard ended the process at once; all after the last checkpoint is lost."""

    exit_code = 130


@contextmanager
def note_whom(whom: Callable[[], str]) -> Iterator[None]:
    """Note on an error of the block whose work failed, "client 3", for the one line of `error_text`; the innermost block wins.

    Errors of hpcfl name the client themselves and get no note. Which verb of which step failed is noted elsewhere, by hpcfl.contract.verbs.blame,
    for the traceback alone.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, HpcflError) and not _read_whom(error):
            error.add_note(f"{AT}{whom()}")
        raise


def error_text(error: BaseException, rank: int) -> str:
    """An error in one line, as in STATUS: type, rank, whose work failed if that is noted, and the message; of an HpcflError the message alone."""
    if isinstance(error, HpcflError):
        return str(error)
    message = f": {error}" if str(error) else ""
    return f"{type(error).__name__} on {', '.join([f'rank {rank}', *_read_whom(error)])}{message}"


def _read_whom(error: BaseException) -> list[str]:
    return [note.removeprefix(AT) for note in getattr(error, "__notes__", []) if note.startswith(AT)]
