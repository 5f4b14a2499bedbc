"""Shared folder: what the file system does with the run folder, seen from all ranks: who can write and see what, locks, renames, the disk."""
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from hpcfl.doctor.probes import LIMIT_S, attempt
from hpcfl.errors import CheckpointError
from hpcfl.files import trees
from hpcfl.wire.communicator import Communicator, require_server

SIGN = "here"                                                      # a file that rank 0 leaves for the others to see
SEEN_WITHIN_S = 5.0                                                # network file systems may show others a new file seconds later
RENAMING_S = 0.3
WRITTEN = 1 << 18                                                  # float32 numbers in a rank's file: 1 MiB
REPEATED = 512                                                     # times that a file holds its number of eight digits, so that a torn one shows
ASK_FOR_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


@dataclass(frozen=True)
class FolderFacts:
    """The run folder; by rank, what did not go as it should."""

    folder: str
    fault: str = ""                                                # why rank 0 cannot write there; then nothing else is known
    file_system: str = ""
    free_bytes: int = 0
    written_bytes: int = 0                                         # by each rank
    write_s: float = 0.0                                           # of the slowest, until it was on the disk and read back
    unwritable: dict[int, str] = field(default_factory=dict)
    unseen: dict[int, str] = field(default_factory=dict)           # who does not see what rank 0 wrote, or is not seen by it
    locks: dict[int, str] = field(default_factory=dict)            # of a file that rank 0 holds: "refused", as it should be, "granted", or why there are none
    replaced: int = 0                                              # times that rank 0 renamed a new file over the old one
    reads: int = 0                                                 # by the others meanwhile
    torn: dict[int, str] = field(default_factory=dict)             # who did not always find the one or the other, whole


def examine(comm: Communicator, folder: Path) -> FolderFacts | None:
    """The facts of a run folder, known at the server; called by all ranks.

    All that is written lies in a folder of its own below, which is gone at the end, as are folders that had to be made for it.
    """
    entered, fault = comm.share(attempt(enter, folder) if comm.is_server else None)
    if fault:
        return FolderFacts(str(folder), fault) if comm.is_server else None
    place, new_folders, disk = entered
    try:
        found = examine_folder(comm, Path(place))
        comm.barrier()                                             # nobody is at work in there any more
    finally:
        if comm.is_server:
            shutil.rmtree(place, ignore_errors=True)
            for each in new_folders:
                attempt(os.rmdir, each)                            # unless somebody has begun to use it
    return FolderFacts(str(folder), **disk, **found) if comm.is_server else None


def enter(folder: Path) -> tuple[str, list[str], dict[str, Any]]:
    """A new folder below the given one with a file in it, the folders that had to be made for it, innermost first, and what is known of the disk."""
    new_folders = [str(each) for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    place = tempfile.mkdtemp(prefix=".doctor-", dir=folder)
    Path(place, SIGN).touch()
    return place, new_folders, {"file_system": find_file_system(folder), "free_bytes": shutil.disk_usage(place).free}


def examine_folder(comm: Communicator, place: Path) -> dict[str, Any]:
    """The other facts at the server, found out step by step: no rank goes on before all have told how they fared; one that sees nothing writes nothing."""
    _, blind = attempt(wait_for, (place / SIGN).is_file, f"what rank 0 wrote does not appear within {SEEN_WITHIN_S:g} s")
    files = [place / f"rank-{rank:04d}.h5" for rank in range(comm.size)]
    told = comm.gather((blind, *(attempt(write, files[comm.rank]) if not blind else (None, ""))))
    locks = lock(comm, place / "LOCK", not blind)
    replaced, reads = rename(comm, place / "LATEST", not blind)
    if not comm.is_server:
        return {}
    answers = require_server(told)
    unseen = {rank: blind for rank, (blind, _, _) in enumerate(answers) if blind}
    unwritable = {rank: fault for rank, (_, _, fault) in enumerate(answers) if fault}
    written = [rank for rank in range(comm.size) if rank not in unseen | unwritable]
    attempt(wait_for, lambda: all(files[rank].is_file() for rank in written), "")
    unseen |= {rank: "rank 0 does not see what it wrote" for rank in written if not files[rank].is_file()}
    slowest_s = max((took for _, took, _ in answers if took), default=0.0)
    return {"written_bytes": 4 * WRITTEN, "write_s": round(slowest_s, 4), "unwritable": unwritable, "unseen": unseen, "locks": locks, "replaced": replaced,
            "reads": sum(count for count, _ in reads), "torn": {rank: fault for rank, (_, fault) in enumerate(reads) if fault}}


def write(file: Path) -> float:
    """Seconds to write a file as checkpoints are written: HDF5, flushed to the disk, read back, renamed.

    Raises: CheckpointError where the disk does not take it or gives back something else.
    """
    written, start = {"x": torch.arange(WRITTEN, dtype=torch.float32)}, time.perf_counter()
    trees.write_trees(file, [("probe", written)])
    if not trees.read_trees(file)["probe"]["x"].equal(written["x"]):
        raise CheckpointError(f"{file}: what is read is not what was written")
    return time.perf_counter() - start


def lock(comm: Communicator, file: Path, sees: bool) -> dict[int, str]:
    """What those are told that ask for the lock which rank 0 holds: "refused", "granted", or why there are no locks; by rank, at the server."""
    handle, fault = attempt(hold, file) if comm.is_server else (None, "")
    fault = comm.share(fault)
    asks = sees and (comm.rank > 0 or comm.size == 1)
    told = comm.gather((fault or ask_for_lock(file)) if asks else "")
    if handle:
        handle.close()
    return {rank: answer for rank, answer in enumerate(told or []) if answer}


def hold(file: Path) -> TextIO:
    """The file, locked as `hpcfl run` locks its folder."""
    handle = file.open("w", encoding="utf-8")
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def ask_for_lock(file: Path) -> str:
    """What another process is told that asks for a lock; one process alone could lock a file twice where flock is made of POSIX locks."""
    ended, fault = attempt(lambda: subprocess.run([sys.executable, "-I", "-S", "-c", ASK_FOR_LOCK, str(file)], stdin=subprocess.DEVNULL, capture_output=True,
                                                  encoding="utf-8", errors="replace", timeout=LIMIT_S, check=False))
    complaint = fault or ended.stderr.strip().rpartition("\n")[2]
    return "granted" if not complaint else "refused" if complaint.startswith("BlockingIOError") else complaint


def rename(comm: Communicator, file: Path, sees: bool) -> tuple[int, list[tuple[int, str]]]:
    """At the server how often it renamed a new file over an old one, and of every rank how often it read meanwhile and what it first found wrong."""
    if comm.is_server:
        attempt(replace, file, 0)                                  # what is wrong here shows again below
    comm.barrier()
    if comm.is_server:
        replaced, fault = attempt(keep_replacing, file)
        return replaced or 0, comm.gather((0, fault)) or []
    _, late = attempt(wait_for, file.is_file, f"it does not appear within {SEEN_WITHIN_S:g} s") if sees else (None, "")
    return 0, comm.gather(keep_reading(file) if sees and not late else (0, late)) or []


def keep_replacing(file: Path) -> int:
    """Rename new files over a file for a while; how many."""
    number, until = 0, time.monotonic() + RENAMING_S
    while time.monotonic() < until:
        number += 1
        replace(file, number)
    return number


def replace(file: Path, number: int) -> None:
    """Put a file that holds a number many times in the place of another."""
    new = file.with_name("NEW")
    new.write_text(f"{number:08d}" * REPEATED, encoding="utf-8")
    os.replace(new, file)


def keep_reading(file: Path) -> tuple[int, str]:
    """(how often the file was read for a while, the first thing that was wrong with it or nothing)."""
    count, faults, until = 0, [], time.monotonic() + RENAMING_S
    while time.monotonic() < until:
        text, fault = attempt(file.read_text, "utf-8")
        count += 1
        if fault or text != text[:8] * REPEATED:
            faults.append(fault or f"read {len(text)} of {8 * REPEATED} characters, or a mixture of two files")
    return count, faults[0] if faults else ""


def wait_for(appears: Callable[[], bool], otherwise: str) -> None:
    """Give what others wrote the time that a network file system may take.

    Raises: CheckpointError where it does not appear.
    """
    until = time.monotonic() + SEEN_WITHIN_S
    while not appears():
        if time.monotonic() > until:
            raise CheckpointError(otherwise)
        time.sleep(0.02)


def find_file_system(folder: Path) -> str:
    """The kind of file system that a folder lies in: "ext4", "nfs4", "lustre"; empty where the system does not tell."""
    path = folder.resolve()
    above = [disk for disk in psutil.disk_partitions(all=True) if path.is_relative_to(disk.mountpoint)]
    return max(above, key=lambda disk: len(disk.mountpoint)).fstype if above else ""
