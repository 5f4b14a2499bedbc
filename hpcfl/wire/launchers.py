"""Launchers: what mpirun and srun say of themselves and in the environment of a process that they start, and what Open MPI must find there."""
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import hpcfl
from hpcfl.errors import EnvironmentFault

LAUNCHERS = {"OMPI_COMM_WORLD_SIZE": ("mpirun of Open MPI", "OMPI_COMM_WORLD_RANK"),         # the first one found counts: innermost launcher first
             "PMI_SIZE": ("mpirun of MPICH or Intel MPI", "PMI_RANK"),
             "SLURM_STEP_NUM_TASKS": ("srun", "SLURM_PROCID"), "SLURM_NTASKS": ("srun", "SLURM_PROCID")}
LIBRARIES = {"Open MPI": ("Open MPI",), "HYDRA": ("MPICH", "MVAPICH"), "Intel": ("Intel",)}     # what mpirun calls itself -> libraries that it launches
OF_THE_JOB = ("OMPI_COMM_WORLD", "PMIX_", "PMI_", "PRTE_LAUNCHED", "SLURM_")          # variables that make a process believe that it is a rank
STEPS = ("SLURM_STEP_ID", "SLURM_STEPID")                          # without one of these SLURM_NTASKS belongs to the batch script, not to a launch
RELAUNCH = ("Launch with the mpirun that belongs to the MPI library of mpi4py, or with srun --mpi=pmix (srun --mpi=list shows what the site offers); "
            "mpi4py must be installed and find its MPI library on every node")
ALONE = "To run one process here, whatever launched the shell that it is started from: hpcfl run --alone"


@dataclass(frozen=True)
class Launch:
    """What the launcher of this process says of it."""

    launcher: str
    variable: str                                                  # of the environment, that says how many ranks there are
    ranks: int
    rank: int


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What the environment says of the launch; None where there was no launcher."""
    in_step = any(environment.get(name) for name in STEPS)
    declared = next((name for name in LAUNCHERS if parse_whole_number(environment.get(name)) and (in_step or name != "SLURM_NTASKS")), None)
    if declared is None:
        return None
    launcher, rank = LAUNCHERS[declared]
    return Launch(launcher, declared, parse_whole_number(environment[declared]), parse_whole_number(environment.get(rank)))


def parse_whole_number(text: str | None) -> int:
    """The number that a variable of the environment says; 0 where it is not set or is no number."""
    return int(text) if text and re.fullmatch(r"\s*[0-9]+\s*", text) else 0


def ask_mpirun(limit_s: float) -> str:
    """What the mpirun in PATH says it is, or why it says nothing; empty where there is none."""
    if shutil.which("mpirun") is None:
        return ""
    try:
        ended = subprocess.run(["mpirun", "--version"], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
                               timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return re.sub(r"\s+", " ", next(iter((ended.stdout + ended.stderr).strip().splitlines()), "mpirun of a kind that does not tell"))


def find_libraries(mpirun: str) -> tuple[str, ...]:
    """How the names of the MPI libraries begin that an mpirun launches, by what it says it is; none where its kind is unknown."""
    return next((libraries for word, libraries in LIBRARIES.items() if word in mpirun), ())


def make_lone_environment() -> dict[str, str]:
    """The environment of a Python process that is started beside this one: it imports the same hpcfl, and does not believe that it is a rank."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_JOB)}
    folders = [str(Path(hpcfl.__file__).parent.parent), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def give_folders() -> None:
    """Set what Open MPI needs to start: a HOME, and where TMPDIR is set one that takes files.

    Raises: EnvironmentFault where no folder takes temporary files.
    """
    try:
        temporary = tempfile.gettempdir()                          # TMPDIR if it can be used
    except FileNotFoundError as error:
        raise EnvironmentFault(f"no folder takes temporary files ({error.strerror}); set TMPDIR to one that does") from None
    home = os.path.expanduser("~")
    os.environ.setdefault("HOME", temporary if home == "~" else home)                    # "~": a user whom no account belongs to, in a container
    if "TMPDIR" in os.environ:
        os.environ["TMPDIR"] = temporary
