"""Revisit: a finished or interrupted run as it was at its last checkpoint, to look into."""
from dataclasses import replace
from pathlib import Path

from hpcfl.errors import CheckpointError, JobError
from hpcfl.federation.state import State
from hpcfl.federation.world import World
from hpcfl.runs import checkpoint
from hpcfl.runs.choices import CHOICES
from hpcfl.runs.devices import choose_device
from hpcfl.settings.job import recall
from hpcfl.wire.communicator import Alone, Communicator


def revisit(run: str | Path) -> tuple[World, State]:
    """The world of a run folder and its state at the last checkpoint, in one process; the run itself is left as it is.

    Raises: JobError where the folder is no run; CheckpointError where there is no checkpoint or a damaged one.
    """
    folder = Path(run)
    if not (folder / "job.toml").is_file():
        raise JobError(f"{folder}: has no job.toml; wanted the folder of a run")
    job = recall(folder / "job.toml", CHOICES)
    job = replace(job, residency=replace(job.residency, folder=""))         # that of the run may be on another machine
    world = World(job, Communicator(Alone()), choose_device("auto", 0))
    state = checkpoint.load(folder, world, [checkpoint.VERSION])
    if state is None:
        raise CheckpointError(f"{folder}: has no checkpoint yet; run the job for at least checkpoint.every rounds")
    return world, state
