"""Launchers: what mpirun and srun say in the environment of a process they started."""
import os
from collections.abc import Mapping
from dataclasses import dataclass

LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": ("mpirun of Open MPI", "OMPI_COMM_WORLD_RANK"),         # the first one found counts: innermost launcher first
             "PMI_SIZE": ("mpirun of MPICH or Intel MPI", "PMI_RANK"),
             "SLURM_STEP_NUM_TASKS": ("srun", "SLURM_PROCID"), "SLURM_NTASKS": ("srun", "SLURM_PROCID")}
STEPS = ("SLURM_STEP_ID", "SLURM_STEPID")                          # without one of these SLURM_NTASKS belongs to the batch script, not to a launch
RELAUNCH = ("Launch with the mpirun that belongs to the MPI library of mpi4py, or with srun --mpi=pmix (srun --mpi=list shows what the site offers); "
            "mpi4py must be installed and find its MPI library on every node")


@dataclass(frozen=True)
class Launch:
    """What the launcher of this process says of it."""

    launcher: str
    variable: str                                                  # of the environment, that says how many ranks there are
    ranks: int
    rank: int


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What the environment says of the launch, None where there was no launcher."""
    in_step = any(name in environment for name in STEPS)
    declared = next((name for name in LAUNCHERS if name in environment and (in_step or name != "SLURM_NTASKS")), None)
    if declared is None:
        return None
    launcher, rank = LAUNCHERS[declared]
    return Launch(launcher, declared, int(environment[declared]), int(environment.get(rank, 0)))
