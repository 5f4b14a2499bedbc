"""Run folder: which one a run works in and where it goes on from, who holds it, and what its STATUS says."""
import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from hpcfl.data.store import NO_LOCKS
from hpcfl.errors import HpcflError, JobError
from hpcfl.files import atomic, lock
from hpcfl.files.places import expand_home
from hpcfl.runs import checkpoint
from hpcfl.runs.choices import CHOICES
from hpcfl.settings.job import Job, recall
from hpcfl.wire.communicator import Communicator

log = logging.getLogger("hpcfl")


def choose_folders(job: Job, out: Path | None, resume: str) -> tuple[str, str | None]:
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
        unfinished = [path for path in begun if checkpoint.find_latest(path) and not is_finished(path) and is_of(path, job)]
        if unfinished:
            return str(unfinished[-1]), str(unfinished[-1])
    folder = out or Path("runs", job.run.name, f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{job.digest()}")
    if resume == "auto" and checkpoint.find_latest(folder):
        return str(folder), str(folder)
    died_early = resume == "auto" and not is_finished(folder)        # in its first checkpoint: nobody can go on from that record
    if ((folder / "metrics.h5").exists() and not died_early) or (resume == "never" and folder.is_dir() and any(folder.iterdir())):
        raise JobError(f"{folder}: holds a run already and nothing is overwritten; choose another --out"
                       + (", or --resume auto to go on with it" if checkpoint.find_latest(folder) else ""))
    return str(folder), None


@contextmanager
def owning(folder: Path, comm: Communicator) -> Iterator[None]:
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


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder came to its end."""
    status = folder / "STATUS"
    return status.is_file() and status.read_bytes().strip() == b"done"


def is_of(folder: Path, job: Job) -> bool:
    """Whether the run in a folder is one of this very job, whatever version recorded it."""
    with suppress(JobError):                                       # a job that cannot be read any more is another
        return recall(folder / "job.toml", CHOICES) == job
    return False


def write_status(folder: Path, text: str) -> None:
    try:
        atomic.note(folder / "STATUS", " ".join(text.split()) + "\n")
    except HpcflError as error:                                    # the status is a courtesy; the error that led here is what matters
        log.warning("%s", error)
