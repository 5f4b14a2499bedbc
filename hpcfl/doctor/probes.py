"""Probes: what one rank finds out about itself, its host and its device, and how fast the wire between the ranks is."""
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy
import psutil
import torch

import hpcfl
from hpcfl.errors import EnvironmentFault, HpcflError
from hpcfl.runs import launch
from hpcfl.runs.host_limits import read_launcher_cores, read_memory_left_bytes, read_quota_cores, read_thread_limit
from hpcfl.wire.communicator import Communicator, require_server
from hpcfl.wire.launchers import OF_THE_JOB

LIMIT_S = 60                                                       # of a process that a probe starts
DRIVER = Path("/proc/driver/nvidia/version")                       # is there where the kernel drives an NVIDIA GPU, whatever torch sees
TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm")       # names under which it is distributed
SOURCES = {"cpu": ("g++", "CXX", ".cpp", ["-fopenmp"], "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"),
           "cuda": ("gcc", "CC", ".c", [], "#include <Python.h>\nint answer(void) { return 42; }\n")}         # what torch.compile needs beside its own
SIZES = (8, 4096, 262_144, 4_194_304)                              # bytes of every rank
MOST_BYTES = 1 << 28                                               # that may arrive at rank 0 at once
WARMING, FEWEST_LAPS, MOST_LAPS, LAPS_S = 2, 3, 50, 0.15           # of one collective and size
CARRY = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); from hpcfl.wire import ranks; ranks.carry({device!r})"


@dataclass(frozen=True)
class Facts:
    """One rank; what is the same for all ranks of a host is asked by its first rank alone and None for the others."""

    rank: int
    host: str
    local_rank: int
    versions: dict[str, str]
    parallel_hdf5: bool
    device: str                                                    # "" where it has none
    device_fault: str
    device_name: str
    device_id: str                                                 # of the GPU, the same for all ranks that use it
    visible_gpus: int
    has_driver: bool                                               # of an NVIDIA GPU
    device_free_bytes: int | None
    cores: float                                                   # this rank's part, of what control groups grant too
    bound_cores: tuple[int, ...]
    launcher_cores: int                                            # that the launcher had to give on this host
    quota_cores: float | None                                      # of all ranks of this host together
    memory_left_bytes: int                                         # of this host, for all its ranks
    resident_bytes: int
    compiler: str | None
    compiler_fault: str | None
    device_buffers: str | None                                     # what came of MPI on GPU memory; "" without a GPU
    mpirun: str | None
    thread_limit: int | None = None                                # OMP_NUM_THREADS
    load: float = 0.0                                              # of this host in the last minute: processes that want a core
    host_cores: int = 0


def attempt(function: Callable, *arguments: Any) -> tuple[Any, str]:
    """(function(*arguments), "") or (None, what it raised): the other ranks wait for this one, so that no fault may keep it from the next collective."""
    try:
        return function(*arguments), ""
    except Exception as error:                                     # whatever it is, it becomes a verdict
        return None, str(error) if isinstance(error, (HpcflError, OSError)) else f"{type(error).__name__}: {error}"


def look_around(comm: Communicator, wanted: str, cores: float) -> Facts:
    """The facts of this rank, which is to use the device that run.device = `wanted` gives it and has so many cores."""
    first = comm.local_rank == 0
    device, fault = attempt(try_device, wanted, comm.local_rank)
    kind = device.type if device else "cpu"
    of_gpu = torch.cuda.get_device_properties(device) if kind == "cuda" else None
    compiler, compiler_fault = attempt(try_compiler, kind) if first else (None, None)
    quota = read_quota_cores()
    return Facts(
        rank=comm.rank, host=platform.node(), local_rank=comm.local_rank, versions=find_versions(comm), parallel_hdf5=bool(h5py.get_config().mpi),
        device=str(device or ""), device_fault=fault, device_name=of_gpu.name if of_gpu else platform.processor() or platform.machine(),
        device_id=str(getattr(of_gpu, "uuid", device.index)) if of_gpu else "", visible_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        has_driver=DRIVER.exists(), device_free_bytes=torch.cuda.mem_get_info(device)[0] if of_gpu else None,
        cores=cores, bound_cores=tuple(sorted(launch.find_bound_cores())), launcher_cores=read_launcher_cores(),
        quota_cores=quota if quota < math.inf else None,
        memory_left_bytes=read_memory_left_bytes(), resident_bytes=psutil.Process().memory_info().rss, compiler=compiler, compiler_fault=compiler_fault,
        device_buffers=(try_device_buffers(str(device)) if of_gpu else "") if first else None, mpirun=ask_mpirun() if first else None,
        thread_limit=int(limit) if (limit := read_thread_limit()) < math.inf else None, load=psutil.getloadavg()[0], host_cores=os.cpu_count() or 1)


def find_versions(comm: Communicator) -> dict[str, str]:
    """Of all that a run is made of; what is not installed is absent."""
    mpi4py, _ = attempt(metadata.version, "mpi4py")
    found = {"hpcfl": hpcfl.__version__, "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__, "h5py": h5py.__version__,
             "HDF5": h5py.version.hdf5_version, "mpi4py": mpi4py, "mpi": comm.library, "mpi standard": comm.standard}
    return {name: version for name, version in found.items() if version}


def try_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank, after a sum on it. Raises: as `launch.choose_device`, and what the device raises."""
    device = launch.choose_device(wanted, local_rank)
    torch.ones(8, device=device).sum().item()
    return device


def try_compiler(kind: str) -> str:
    """The compiler that torch.compile calls for a kind of device, after it has made a library of a few lines as torch and triton have it do.

    Raises: EnvironmentFault with what is missing.
    """
    name, variable, suffix, flags, source = SOURCES[kind]
    if kind == "cuda" and not any(attempt(metadata.version, name)[0] for name in TRITON):
        raise EnvironmentFault("triton is not installed")
    command = shlex.split(os.environ.get(variable) or name)
    if shutil.which(command[0]) is None and kind == "cuda" and not os.environ.get(variable):
        command = ["clang"]
    if shutil.which(command[0]) is None:
        raise EnvironmentFault(f"'{command[0]}' ({variable} if set, else {name}) is not in PATH")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"probe{suffix}")
        file.write_text(source, encoding="utf-8")
        ended = subprocess.run([*command, "-shared", "-fPIC", *flags, f"-I{sysconfig.get_paths()['include']}", str(file), "-o", str(file.with_suffix(".so"))],
                               capture_output=True, encoding="utf-8", errors="replace", timeout=LIMIT_S, check=False)
    if ended.returncode:
        complaint = next((line for line in ended.stderr.splitlines() if "error" in line), ended.stderr.strip().rpartition("\n")[2])
        raise EnvironmentFault(f"'{command[0]}' does not compile what torch.compile gives it: {complaint.strip() or f'exit code {ended.returncode}'}")
    return shlex.join(command)


def try_device_buffers(device: str) -> str:
    """What becomes of a process of its own in which MPI reads and writes the memory of a device: "yes", or how it ended."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_JOB)}
    alone["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(hpcfl.__file__).parent.parent), alone.get("PYTHONPATH")]))
    try:
        ended = subprocess.run([sys.executable, "-c", CARRY.format(device=device)], env=alone, stdin=subprocess.DEVNULL,
                               capture_output=True, encoding="utf-8", errors="replace", timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"it did not end within {LIMIT_S} s"
    if ended.returncode < 0:
        return f"it was ended by {signal.Signals(-ended.returncode).name}"
    return "yes" if ended.returncode == 0 else ended.stderr.strip().rpartition("\n")[2] or f"exit code {ended.returncode}"


def ask_mpirun() -> str:
    """What the mpirun in PATH says it is; empty where there is none."""
    if shutil.which("mpirun") is None:
        return ""
    ended, fault = attempt(lambda: subprocess.run(["mpirun", "--version"], stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
                                                  timeout=LIMIT_S, check=False))
    return fault or re.sub(r"\s+", " ", next(iter((ended.stdout + ended.stderr).strip().splitlines()), "mpirun of a kind that does not tell"))


def time_wire(comm: Communicator) -> list[dict[str, Any]]:
    """Bcast, Reduce and Gatherv of a few sizes, each with the median over repetitions of what the slowest rank took; known at the server, empty for one rank.

    Called by all ranks; a few seconds at most.
    """
    rows = []
    for size in SIZES:
        if size * comm.size > MOST_BYTES:
            continue
        for name, carry_out in comm.collectives(size).items():
            start = time.perf_counter()
            for _ in range(WARMING):
                time_lap(comm, carry_out)
            each_s = (time.perf_counter() - start) / WARMING       # the waiting for each other included, which may take longer
            count = comm.share(max(FEWEST_LAPS, min(MOST_LAPS, int(LAPS_S / each_s))))
            told = comm.gather([time_lap(comm, carry_out) for _ in range(count)])
            if comm.is_server:
                slowest = [max(laps) for laps in zip(*require_server(told), strict=True)]
                rows.append({"collective": name, "rank_bytes": size, "median_s": round(median(slowest), 9), "repetitions": count})
    return rows


def time_lap(comm: Communicator, carry_out: Callable[[], object]) -> float:
    """Seconds that one collective call takes here once all ranks are there."""
    comm.barrier()
    start = time.perf_counter()
    carry_out()
    return time.perf_counter() - start
