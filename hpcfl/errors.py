"""What can go wrong, as types: every error says what, where, got, wanted and the way out, and knows the exit code of the process."""


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
