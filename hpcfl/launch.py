"""Launch: from a job file to a running simulation: folder, lock, device, threads, signals, and an end with the right exit code on every rank."""
import fcntl
import logging
import os
import platform
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

import hpcfl
from hpcfl import checkpoint, storage
from hpcfl.algorithms import CONFIGS
from hpcfl.comm import Alone, Communicator
from hpcfl.console import Console, keep_log
from hpcfl.data.store import NO_LOCKS
from hpcfl.errors import CheckpointError, EnvironmentFault, HpcflError, JobError, Stopped
from hpcfl.federation import State
from hpcfl.job import Job, load
from hpcfl.simulation import Simulation
from hpcfl.watchdog import watching
from hpcfl.world import World, resolved

log = logging.getLogger("hpcfl")


def run(job: Job, comm: Communicator, out: Path | None, resume: str, may_differ: tuple[str, ...] = (), stop_requested: Callable[[], bool] = bool) -> Path:
    """Carry out a job in its run folder and return the folder.

    out: the run folder itself, by default runs/<name>/<UTC>-<hash8>. resume: "auto" goes on from the folder's last checkpoint (without `out` from the
    newest unfinished run of the same job), "never" wants an empty folder, anything else is the path of a run folder or of one checkpoint.
    stop_requested: asked after every round; by default never.
    Raises: the errors of hpcfl.errors; Stopped after a checkpoint on a signal.
    """
    job = resolved(job, comm.size)
    folder, resume_from = (Path(path) if path else None for path in comm.share(_folders(job, out, resume) if comm.is_server else None))
    with _owning(folder, comm), watching(comm, folder, job.timeouts.collective, partial(_fail, folder)):
        keep_log(folder, comm.rank)
        console = Console(comm.is_server, live=comm.size == 1 and sys.stdout.isatty())     # mpirun gives its ranks a terminal that is none
        if comm.share(comm.is_server and resume_from == folder and _finished(folder, job)):
            console.say(f"{folder}: already done; choose another --out to run it again")
            return folder
        set_threads(job, comm)
        device = choose_device(job.run.device, comm.local_rank)
        if job.run.deterministic and device.type == "cuda":
            raise JobError("run.deterministic = true promises the same bits, which no GPU keeps, but run.device chose one; set run.device = 'cpu', or "
                           "run.deterministic = false")
        world = World(job, comm, device, comm.share(checkpoint.past(resume_from) if comm.is_server and resume_from else None))
        console.say(f"{job.run.name}: {job.algorithm_name} on {job.data.name}, {world.clients} clients on {comm.size} rank(s), "
                    f"{sum(phase.rounds for phase in world.plan)} rounds -> {folder}")
        simulation = Simulation(world, folder, console, stop_requested)
        if resume_from:
            simulation.resume(resume_from, may_differ)             # before anything is written: a refusal changes nothing
        environments = comm.gather(_environment(comm, device))
        if comm.is_server:
            checkpoint.clear(folder, resume_from)
            storage.write_text(folder / "job.toml", job.to_toml())
            storage.write_json(folder / "environment.json", {"command": sys.argv, "hpcfl": hpcfl.__version__, "ranks": environments})
            storage.write_text(folder / "STATUS", "running\n")
        try:
            with console.beating(job.timeouts.heartbeat, simulation.so_far):
                simulation.run()
        except BaseException as error:
            status = "stopped" if isinstance(error, Stopped) else "failed"
            if status == "failed" or comm.is_server:
                _write_status(folder, f"{status}: {str(error) or type(error).__name__}")
            raise
        finally:
            console.close()
        if comm.is_server:
            _write_status(folder, "done")
    return folder


def revisit(run: str | Path) -> tuple[World, State]:
    """The world of a run folder and its state at the last checkpoint, in one process; the run itself is left as it is.

    Raises: JobError where the folder is no run; CheckpointError where there is no checkpoint or a damaged one.
    """
    folder = Path(run)
    if not (folder / "job.toml").is_file():
        raise JobError(f"{folder}: has no job.toml; wanted the folder of a run")
    job = load(folder / "job.toml", CONFIGS)
    job = replace(job, clients=replace(job.clients, folder=""))    # that of the run may be on another machine
    world = World(job, Communicator(Alone()), choose_device("auto", 0))
    state = checkpoint.load(folder, world, [checkpoint.VERSION])
    if state is None:
        raise CheckpointError(f"{folder}: has no checkpoint yet; run the job for at least checkpoint.every rounds")
    return world, state


def guarded(body: Callable[[], int], comm: Communicator) -> int:
    """Run `body` and return the exit code of the process; an error ends the whole job at once, with this rank's message or traceback.

    Where all ranks fail alike the server speaks first and the abort takes the others along before they repeat it.
    """
    try:
        return body()
    except Stopped as error:
        if comm.is_server:
            print(f"hpcfl: {error}", flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        text, code = "interrupted from the keyboard", 130
    except HpcflError as error:
        text, code = str(error), error.exit_code
        log.debug("raised at", exc_info=True)
    except Exception as error:
        text, code = traceback.format_exc(), getattr(error, "exit_code", 1)
    if not comm.is_server:
        time.sleep(0.5)
    print(f"hpcfl: rank {comm.rank}: {text}" if comm.size > 1 else f"hpcfl: {text}", file=sys.stderr, flush=True)
    if comm.size > 1:
        comm.abort(code)
    return code


def set_threads(job: Job, comm: Communicator) -> None:
    """Threads of this rank: run.threads, else one when deterministic, else as many as it has cores.

    Called by all ranks.
    """
    cores = cores_of_rank(comm)
    torch.set_num_threads(job.run.threads or (1 if job.run.deterministic else max(1, int(cores))))


def cores_of_rank(comm: Communicator) -> float:
    """This rank's part of the node's cores: each core is shared by the ranks bound to it.

    Called by all ranks.
    """
    own = platform.node(), bound_cores()
    ranks = Counter((host, core) for host, cores in comm.share(comm.gather(own)) for core in cores)
    return round(sum(1 / ranks[own[0], core] for core in own[1]), 6)


def bound_cores() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of this rank: the GPU of its local rank modulo those visible, or the CPU.

    Raises: EnvironmentFault where device = "cuda" and torch sees no GPU.
    """
    visible = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and visible == 0:
        raise EnvironmentFault("run.device = 'cuda', but torch sees no CUDA device (torch.cuda.is_available() is False): wanted a GPU, its driver and a CUDA "
                               "build of torch; set run.device = 'auto' to use the CPU where there is none")
    if visible == 0:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % visible)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False        # float32 is what its name says, as on a CPU
    return device


def _folders(job: Job, out: Path | None, resume: str) -> tuple[str, str | None]:
    """(run folder, where to resume from or None), decided at the server."""
    if resume not in ("auto", "never"):
        source = Path(resume)
        found = checkpoint.latest(source)
        if found is None:
            raise JobError(f"--resume {source}: no checkpoint there; wanted a run folder with LATEST or a folder with manifest.json")
        origin = found.parent.parent
        if out and out.resolve() != origin.resolve() and (out / "metrics.h5").exists():
            raise JobError(f"{out}: holds a run already and nothing is overwritten; choose another --out for what goes on from {source}")
        return str(out or origin), str(source)
    if out is None and resume == "auto":
        unfinished = [path for path in sorted(Path("runs", job.run.name).glob(f"*-{job.digest()}")) if checkpoint.latest(path) and not _finished(path)]
        if unfinished:
            return str(unfinished[-1]), str(unfinished[-1])
    folder = out or Path("runs", job.run.name, f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{job.digest()}")
    if resume == "auto" and checkpoint.latest(folder):
        return str(folder), str(folder)
    died_early = resume == "auto" and not _finished(folder)        # in its first checkpoint: nobody can go on from that record
    if ((folder / "metrics.h5").exists() and not died_early) or (resume == "never" and folder.is_dir() and any(folder.iterdir())):
        raise JobError(f"{folder}: holds a run already and nothing is overwritten; choose another --out"
                       + (", or --resume auto to go on with it" if checkpoint.latest(folder) else ""))
    return str(folder), None


@contextmanager
def _owning(folder: Path, comm: Communicator) -> Iterator[None]:
    """Hold the run folder for this run; a second run on it is refused. The lock goes with the process that holds it, whatever LOCK says."""
    handle, failure = None, None
    if comm.is_server:
        try:
            storage.make_folder(folder)
            handle = (folder / "LOCK").open("a+")                  # what another has written there is not to be lost
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            handle.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=handle, flush=True)
        except BlockingIOError:
            handle.seek(0)
            failure = f"{folder}: another run is at work in this folder ({handle.read().strip()}); wait for it, or choose another --out"
        except OSError as error:
            failure = None if error.errno in NO_LOCKS else f"{folder}: cannot write there: {error.strerror}; choose a writable folder with --out"
    failure = comm.share(failure)
    if failure:
        raise JobError(failure)
    try:
        yield
    finally:
        if handle:
            handle.close()


def _finished(folder: Path, job: Job | None = None) -> bool:
    """Whether the run in a folder came to its end; given a job, also whether it was this very job."""
    status, carried_out = folder / "STATUS", folder / "job.toml"
    done = status.is_file() and status.read_bytes().strip() == b"done"
    return done and (job is None or (carried_out.is_file() and carried_out.read_bytes() == job.to_toml().encode()))


def _fail(folder: Path, why: str) -> None:
    _write_status(folder, f"failed: {why}")


def _write_status(folder: Path, text: str) -> None:
    try:
        storage.note(folder / "STATUS", " ".join(text.split()) + "\n")
    except HpcflError as error:                                    # the status is a courtesy; the error that led here is what matters
        log.warning("%s", error)


def _environment(comm: Communicator, device: torch.device) -> dict:
    import h5py
    import numpy
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"rank": comm.rank, "host": platform.node(), "device": str(device), "device_name": name, "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__, "h5py": h5py.__version__, "mpi": comm.library}
