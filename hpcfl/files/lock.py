"""lock: who holds a run folder, as its file LOCK says, and whether a run whose STATUS is "running" still is."""
import fcntl
import json
import os
import platform
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from hpcfl.wording import duration_text

NAME = "LOCK"
SIGNS = ("metrics.h5", "LATEST", "STATUS", "log/rank-0000.log")    # files that a run touches while it goes on


def describe_holder() -> dict[str, str | int]:
    """What the file says of this process: no other has its number on its host and began when it did."""
    began = datetime.fromtimestamp(psutil.Process().create_time(), UTC)
    return {"host": platform.node(), "pid": os.getpid(), "started": began.isoformat(timespec="seconds")}


def holder_text(text: str) -> str:
    """What is in the file, in words; an earlier hpcfl wrote words."""
    try:
        return "process {pid} on {host}, since {started}".format(**json.loads(text))
    except (ValueError, TypeError, KeyError):
        return text.strip()


def read_status(folder: Path, said: str) -> str:
    """The status of a run that says "running": also where its process died without a word, or where nobody here can know.

    The lock goes with the process that holds it, so that on its host a lock that is free means that the run is over, whoever has its number since.
    """
    if said != "running":
        return said
    found = re.match(r"process \d+ on ([^\s,]+)", holder_text(_read(folder / NAME)))
    if found and found[1] == platform.node() and (free := _is_free(folder / NAME)) is not None:
        return f"died: {found[0]} ended without a word; the same command goes on from its last checkpoint" if free else said
    where = f"on {found[1]}" if found else "nobody says where"
    return f"running?: {where}, which cannot be checked from here; last sign of it {_age_text(folder)} ago"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _is_free(path: Path) -> bool | None:
    """Whether nobody holds the lock; None where the file system knows no locks."""
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _age_text(folder: Path) -> str:
    seconds = time.time() - max((path.stat().st_mtime for path in map(folder.joinpath, SIGNS) if path.is_file()), default=0.0)
    return duration_text(max(0.0, seconds))
