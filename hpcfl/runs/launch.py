"""Launch: from a job to a running simulation in its run folder, and to the STATUS that says how it ended."""
import logging
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch

import hpcfl
from hpcfl.errors import Interrupted, Stopped, error_text
from hpcfl.federation.world import World
from hpcfl.files import atomic
from hpcfl.report import lone_clients
from hpcfl.runs import checkpoint
from hpcfl.runs.console import Console, keep_log
from hpcfl.runs.devices import choose_job_device, set_threads, spare_threads
from hpcfl.runs.run_folder import choose_folders, is_finished, is_of, owning, write_status
from hpcfl.runs.simulation import Simulation
from hpcfl.runs.watchdog import watching
from hpcfl.settings.job import Job, refuse_old_names
from hpcfl.wire.communicator import Communicator
from hpcfl.wire.launchers import read_launch
from hpcfl.wording import count_text, duration_text

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
    chosen = comm.share(choose_folders(job, Path(out) if out else None, resume) if comm.is_server else None)
    folder, resume_from = Path(chosen[0]), Path(chosen[1]) if chosen[1] else None
    with owning(folder, comm), watching(comm, folder, job.timeouts.collective, partial(_fail, folder)):
        keep_log(folder, comm.rank)
        # A launcher gives its ranks terminals that are none, and standard output may be closed.
        console = Console(comm.is_server, live=read_launch() is None and getattr(sys.stdout, "isatty", bool)())
        if comm.share(comm.is_server and resume_from == folder and is_finished(folder) and is_of(folder, job)):
            console.say(f"{folder}: already done; choose another --out to run it again")
            return folder
        simulation = _set_up(job, comm, folder, resume_from, console, stop_requested)
        if resume_from:
            simulation.resume(resume_from, may_differ)             # before anything is written: a refusal changes nothing
        _write_what_runs(job, comm, folder, resume_from, simulation.world.problem.device)
        with closing(console), _noting_the_end(folder, comm), console.beating(job.timeouts.heartbeat, simulation.so_far):
            simulation.run()
        console.say(f"done after {duration_text(time.monotonic() - began_s)}: {folder}; figures and a page: hpcfl report {shlex.quote(str(folder))}")
    return folder


def _set_up(job: Job, comm: Communicator, folder: Path, resume_from: Path | None, console: Console, stop_requested: Callable[[], bool]) -> Simulation:
    """The simulation before its first round, on this rank's device and threads, and what people read of it before it begins."""
    device = choose_job_device(job, comm)
    set_threads(job, comm)
    world = World(job, comm, device, comm.share(checkpoint.read_past(resume_from) if comm.is_server and resume_from else None))
    spare_threads(world)
    console.say(f"{job.run.name}: {job.algorithm_name} on {job.data.name}, {world.clients} clients on {comm.size} rank(s) of "
                f"{count_text(torch.get_num_threads(), 'thread')}, {sum(phase.rounds for phase in world.plan)} rounds -> {folder}")
    for remark in world.corpus.remarks:
        console.say(f"{job.data.name}: {remark}")
    console.announce(len(world.corpus.test_labels), world.has_global_models, job.evaluation.personal and any(map(len, world.split.test)))
    if comm.is_server and (warning := lone_clients.warning_text(job.algorithm_name, world.averages(world.steps))):
        log.warning(warning)
    return Simulation(world, folder, console, stop_requested)


def _write_what_runs(job: Job, comm: Communicator, folder: Path, resume_from: Path | None, device: torch.device) -> None:
    """The job, where it runs, and that it does. Called by all ranks."""
    environments = comm.gather(_describe_environment(comm, device))
    if comm.is_server:
        checkpoint.clear(folder, resume_from)
        atomic.write_text(folder / "job.toml", job.to_toml())
        atomic.write_json(folder / "environment.json", {"command": sys.argv, "hpcfl": hpcfl.__version__, "ranks": environments})
        atomic.write_text(folder / "STATUS", "running\n")


@contextmanager
def _noting_the_end(folder: Path, comm: Communicator) -> Iterator[None]:
    """However the block ends, STATUS says it. Raises: what the block raises; Interrupted in the place of KeyboardInterrupt."""
    try:
        yield
    except KeyboardInterrupt:
        error = Interrupted(f"{folder}: interrupted from the keyboard; {checkpoint.way_on_text(folder)}")
        write_status(folder, f"stopped: {error}")
        raise error from None
    except Stopped as error:
        if comm.is_server:
            write_status(folder, f"stopped: {error}")
        raise
    except BaseException as error:
        write_status(folder, f"failed: {error_text(error, comm.rank)}")
        raise
    if comm.is_server:
        write_status(folder, "done")


def _fail(folder: Path, why: str) -> None:
    write_status(folder, f"failed: {why}")


def _describe_environment(comm: Communicator, device: torch.device) -> dict:
    import h5py
    import numpy
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"rank": comm.rank, "host": platform.node(), "device": str(device), "device_name": name, "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__, "h5py": h5py.__version__, "mpi": comm.library}
