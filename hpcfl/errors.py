"""What can go wrong, as types: every error says what, where, got, wanted and the way out, and knows the exit code of the process."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AT = "at "                                                         # begins the note of an error that says with whom it came up


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
    """Training did not come to what it must come to; the message names client, round and phase."""

    exit_code = 6


class NonFiniteError(TrainingError):
    """Training produced NaN or infinity; the message names client, round and phase."""


class RankMissing(HpcflError):
    """A rank did not arrive where the others waited for it, within the time that the job allows."""

    exit_code = 7


class LayoutError(HpcflError):
    """Two parties of one collective brought Trees of different paths, shapes or types."""


class Stopped(HpcflError):
    """A signal asked the run to stop; a checkpoint lies behind it and the job may be requeued."""

    exit_code = 75


class Interrupted(HpcflError):
    """Somebody at the keyboard ended the process at once; what came after the last checkpoint is lost."""

    exit_code = 130


@contextmanager
def note_whom(whom: Callable[[], str]) -> Iterator[None]:
    """Have what goes wrong in the block note with whom it did; the innermost block knows best. What hpcfl raises on purpose says so itself."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, HpcflError) and not _read_whom(error):
            error.add_note(f"{AT}{whom()}")
        raise


def error_text(error: BaseException, rank: int) -> str:
    """An error in one line: type, rank, with whom as far as that is known, and what it says; of those that hpcfl raises on purpose what they say."""
    if isinstance(error, HpcflError):
        return str(error)
    said = f": {error}" if str(error) else ""
    return f"{type(error).__name__} on {', '.join([f'rank {rank}', *_read_whom(error)])}{said}"


def _read_whom(error: BaseException) -> list[str]:
    return [note.removeprefix(AT) for note in getattr(error, "__notes__", []) if note.startswith(AT)]
