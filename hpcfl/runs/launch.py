"""Launch: from a job file to a running simulation: folder, lock, device, threads, signals, and an end with the right exit code on every rank."""
import fcntl
import json
import logging
import os
import platform
import shlex
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

import hpcfl
from hpcfl.algorithms import CONFIGS
from hpcfl.data.store import NO_LOCKS
from hpcfl.errors import CheckpointError, EnvironmentFault, HpcflError, Interrupted, JobError, Stopped, error_text
from hpcfl.federation.state import State
from hpcfl.federation.world import World
from hpcfl.files import atomic, lock
from hpcfl.files.places import expand_home
from hpcfl.report import averaging
from hpcfl.runs import checkpoint
from hpcfl.runs.console import Console, keep_log
from hpcfl.runs.host_limits import choose_threads, read_quota_cores, read_thread_limit
from hpcfl.runs.simulation import Simulation
from hpcfl.runs.watchdog import watching
from hpcfl.settings.job import Job, recall, refuse_old_names
from hpcfl.wire.communicator import Alone, Communicator
from hpcfl.wire.launchers import read_launch
from hpcfl.wording import count_text, duration_text

WORTH_A_THREAD_FLOPS = 100_000_000                                 # of a batch's forward pass: with less a second thread costs more than it does (README)
log = logging.getLogger("hpcfl")


def run(job: Job, comm: Communicator, out: str | Path | None, resume: str, may_differ: tuple[str, ...] = (), stop_requested: Callable[[], bool] = bool) -> Path:
    """Carry out a job in its run folder and return the folder.

    out: the run folder itself, by default runs/<name>/<UTC>-<hash8>. resume: "auto" goes on from the folder's last checkpoint (without `out` from the
    newest unfinished run of the same job), "never" wants an empty folder, anything else is the path of a run folder or of one checkpoint.
    stop_requested: asked after every round; by default never.
    Raises: the errors of hpcfl.errors; Stopped after a checkpoint on a signal, Interrupted without one.
    """
    refuse_old_names(may_differ, "--may-differ")
    began_s = time.monotonic()
    chosen = comm.share(_choose_folders(job, Path(out) if out else None, resume) if comm.is_server else None)
    folder, resume_from = Path(chosen[0]), Path(chosen[1]) if chosen[1] else None
    with _owning(folder, comm), watching(comm, folder, job.timeouts.collective, partial(_fail, folder)):
        keep_log(folder, comm.rank)
        # A launcher gives its ranks terminals that are none, and standard output may be closed.
        console = Console(comm.is_server, live=read_launch() is None and getattr(sys.stdout, "isatty", bool)())
        if comm.share(comm.is_server and resume_from == folder and _is_finished(folder) and _is_of(folder, job)):
            console.say(f"{folder}: already done; choose another --out to run it again")
            return folder
        device = choose_job_device(job, comm)
        set_threads(job, comm)
        world = World(job, comm, device, comm.share(checkpoint.read_past(resume_from) if comm.is_server and resume_from else None))
        spare_threads(world)
        console.say(f"{job.run.name}: {job.algorithm_name} on {job.data.name}, {world.clients} clients on {comm.size} rank(s) of "
                    f"{count_text(torch.get_num_threads(), 'thread')}, {sum(phase.rounds for phase in world.plan)} rounds -> {folder}")
        for remark in world.corpus.remarks:
            console.say(f"{job.data.name}: {remark}")
        console.announce(len(world.corpus.test_labels), world.has_global_models, job.evaluation.personal and any(map(len, world.split.test)))
        if comm.is_server and (warning := averaging.warning_text(job.algorithm_name, world.averages(world.steps))):
            log.warning(warning)
        simulation = Simulation(world, folder, console, stop_requested)
        if resume_from:
            simulation.resume(resume_from, may_differ)             # before anything is written: a refusal changes nothing
        environments = comm.gather(_describe_environment(comm, device))
        if comm.is_server:
            checkpoint.clear(folder, resume_from)
            atomic.write_text(folder / "job.toml", job.to_toml())
            atomic.write_json(folder / "environment.json", {"command": sys.argv, "hpcfl": hpcfl.__version__, "ranks": environments})
            atomic.write_text(folder / "STATUS", "running\n")
        try:
            with console.beating(job.timeouts.heartbeat, simulation.so_far):
                simulation.run()
        except KeyboardInterrupt:
            error = Interrupted(f"{folder}: interrupted from the keyboard; {checkpoint.way_on_text(folder)}")
            _write_status(folder, f"stopped: {error}")
            raise error from None
        except Stopped as error:
            if comm.is_server:
                _write_status(folder, f"stopped: {error}")
            raise
        except BaseException as error:
            _write_status(folder, f"failed: {error_text(error, comm.rank)}")
            raise
        finally:
            console.close()
        if comm.is_server:
            _write_status(folder, "done")
        console.say(f"done after {duration_text(time.monotonic() - began_s)}: {folder}; figures and a page: hpcfl report {shlex.quote(str(folder))}")
    return folder


def revisit(run: str | Path) -> tuple[World, State]:
    """The world of a run folder and its state at the last checkpoint, in one process; the run itself is left as it is.

    Raises: JobError where the folder is no run; CheckpointError where there is no checkpoint or a damaged one.
    """
    folder = Path(run)
    if not (folder / "job.toml").is_file():
        raise JobError(f"{folder}: has no job.toml; wanted the folder of a run")
    job = recall(folder / "job.toml", CONFIGS)
    job = replace(job, residency=replace(job.residency, folder=""))         # that of the run may be on another machine
    world = World(job, Communicator(Alone()), choose_device("auto", 0))
    state = checkpoint.load(folder, world, [checkpoint.VERSION])
    if state is None:
        raise CheckpointError(f"{folder}: has no checkpoint yet; run the job for at least checkpoint.every rounds")
    return world, state


def run_guarded(body: Callable[[], int], comm: Communicator) -> int:
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
        text, code = "interrupted from the keyboard", Interrupted.exit_code
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
    """Have torch use the threads that are this rank's. Called by all ranks."""
    torch.set_num_threads(choose_threads(job.run, count_cores(comm), read_thread_limit()))


def spare_threads(world: World) -> None:
    """Have torch use fewer threads where the largest batch of a classifier does not keep so many busy, unless the job says how many.

    A batch is weighed by the operations of its forward pass, so that the number, on which the last bits hang, follows from the job and the launch alone.
    What a method trains beside classifiers, or all clients at once, is not weighed: then all stay.
    """
    job, sizes = world.job, [len(part) for part in world.split.train]
    weighed = all(networks.keys() <= {"model"} for networks in world.modules.values()) and job.training.engine != "vmap"
    if job.run.threads or not weighed or world.problem.device.type == "cuda":
        return
    flops = max(min(job.training.batch, size) * flops for size, flops in zip(sizes, world.forward_flops, strict=True))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), flops // WORTH_A_THREAD_FLOPS)))


def count_cores(comm: Communicator) -> float:
    """This rank's part of its host's cores: each core is shared by the ranks bound to it, the time that control groups grant by all ranks of the host.

    Called by all ranks.
    """
    host, own, quota = platform.node(), find_bound_cores(), read_quota_cores()
    told = [cores for other, cores in comm.share(comm.gather((host, own))) if other == host]
    sharing = Counter(core for cores in told for core in cores)
    return min(round(sum(1 / sharing[core] for core in own), 6), quota / len(told))


def find_bound_cores() -> set[int]:
    """The cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def choose_job_device(job: Job, comm: Communicator) -> torch.device:
    """The device of this rank, with which the job's promises can be kept.

    Raises: EnvironmentFault as `choose_device`; JobError where the same bits are promised and a GPU or several threads would be at work.
    """
    device = choose_device(job.run.device, comm.local_rank)
    if job.run.deterministic and device.type == "cuda":
        raise JobError("run.deterministic = true promises the same bits, which no GPU keeps, but run.device chose one; set run.device = 'cpu', or "
                       "run.deterministic = false")
    if job.run.deterministic and job.run.threads > 1:
        raise JobError(f"run.deterministic = true promises the same bits, which take one thread for each rank, as the libraries below torch share out work, "
                       f"and round, as they find cores free; got run.threads = {job.run.threads}, wanted 0 or 1, or run.deterministic = false")
    return device


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


def _choose_folders(job: Job, out: Path | None, resume: str) -> tuple[str, str | None]:
    """(run folder, where to resume from or None), decided at the server."""
    if resume not in ("auto", "never"):
        source = expand_home(resume)
        found = checkpoint.find_latest(source)
        if found is None:
            raise JobError(f"--resume {source}: no checkpoint there; wanted a run folder with LATEST or a folder with manifest.json")
        origin = found.parent.parent
        if out and out.resolve() != origin.resolve() and (out / "metrics.h5").exists():
            raise JobError(f"{out}: holds a run already and nothing is overwritten; choose another --out for what goes on from {source}")
        return str(out or origin), str(source)
    if out is None and resume == "auto":
        begun = sorted(Path("runs", job.run.name).glob(f"*Z-{'?' * 8}"))           # by time: of what the digest is made changes with the version
        unfinished = [path for path in begun if checkpoint.find_latest(path) and not _is_finished(path) and _is_of(path, job)]
        if unfinished:
            return str(unfinished[-1]), str(unfinished[-1])
    folder = out or Path("runs", job.run.name, f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{job.digest()}")
    if resume == "auto" and checkpoint.find_latest(folder):
        return str(folder), str(folder)
    died_early = resume == "auto" and not _is_finished(folder)        # in its first checkpoint: nobody can go on from that record
    if ((folder / "metrics.h5").exists() and not died_early) or (resume == "never" and folder.is_dir() and any(folder.iterdir())):
        raise JobError(f"{folder}: holds a run already and nothing is overwritten; choose another --out"
                       + (", or --resume auto to go on with it" if checkpoint.find_latest(folder) else ""))
    return str(folder), None


@contextmanager
def _owning(folder: Path, comm: Communicator) -> Iterator[None]:
    """Hold the run folder for this run; a second run on it is refused. The lock goes with the process that holds it, whatever LOCK says."""
    handle, failure = None, None
    if comm.is_server:
        try:
            atomic.make_folder(folder)
            handle = (folder / lock.NAME).open("a+", encoding="utf-8")                   # what another has written there is not to be lost
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            handle.truncate(0)
            print(json.dumps(lock.describe_holder()), file=handle, flush=True)
        except BlockingIOError:
            holder = (folder / lock.NAME).read_text(encoding="utf-8")
            failure = f"{folder}: another run is at work in this folder ({lock.holder_text(holder)}); wait for it, or choose another --out"
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


def _is_finished(folder: Path) -> bool:
    """Whether the run in a folder came to its end."""
    status = folder / "STATUS"
    return status.is_file() and status.read_bytes().strip() == b"done"


def _is_of(folder: Path, job: Job) -> bool:
    """Whether the run in a folder is one of this very job, whatever version recorded it."""
    with suppress(JobError):                                       # a job that cannot be read any more is another
        return recall(folder / "job.toml", CONFIGS) == job
    return False


def _fail(folder: Path, why: str) -> None:
    _write_status(folder, f"failed: {why}")


def _write_status(folder: Path, text: str) -> None:
    try:
        atomic.note(folder / "STATUS", " ".join(text.split()) + "\n")
    except HpcflError as error:                                    # the status is a courtesy; the error that led here is what matters
        log.warning("%s", error)


def _describe_environment(comm: Communicator, device: torch.device) -> dict:
    import h5py
    import numpy
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"rank": comm.rank, "host": platform.node(), "device": str(device), "device_name": name, "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__, "h5py": h5py.__version__, "mpi": comm.library}
