"""run_folders: which folders hold a run, and how it stands with it."""
import os
from collections.abc import Sequence
from pathlib import Path

from hpcfl.errors import JobError
from hpcfl.files import lock

DEEP = 4                                                           # folders below a named one in which runs are looked for


def find_runs(places: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """The run folders that are named or lie in named folders, each once, and a line on every other thing that was named or looks like a run.

    Raises: JobError where no run is left.
    """
    found: dict[Path, Path] = {}
    skipped: list[str] = []
    for place in map(Path, places):
        runs, begun = _search(place, DEEP)
        for run in runs:
            found.setdefault(run.resolve(), run)
        skipped += [f"{folder}: {why_no_run(folder)}" for folder in begun or ([] if runs else [place])]
    if not found:
        raise JobError("; ".join(skipped) or "no run was named; wanted at least one run folder, or a folder of them")
    return list(found.values()), list(dict.fromkeys(skipped))


def read_status(folder: Path) -> str:
    """What a run says of itself in STATUS, and what its LOCK adds; "unknown" where it says nothing."""
    path = folder / "STATUS"
    return lock.read_status(folder, path.read_text(encoding="utf-8", errors="replace").strip() or "unknown") if path.is_file() else "unknown"


def why_no_run(folder: Path) -> str:
    """What a place is that is no run folder with a record, and what was wanted."""
    if folder.is_file():
        return "is a file, wanted the run folder that holds it"
    if not folder.is_dir():
        return "no such folder, wanted a run folder as `hpcfl run` writes it (runs/<name>/<UTC>-<hash8>)"
    inner = sorted(path.parent for path in folder.glob("*/metrics.h5"))
    if inner:
        return f"is no run folder but holds {len(inner)}; name them, for example {inner[-1]}"
    status = f"; its STATUS is '{read_status(folder)}', so no round was finished" if (folder / "STATUS").is_file() else ""
    return f"is no run folder, it has no metrics.h5{status}"


def _search(place: Path, deep: int) -> tuple[list[Path], list[Path]]:
    """The run folders at a place and up to so many folders below it, and those of runs that finished no round."""
    if (place / "metrics.h5").is_file():
        return [place], []
    if (place / "STATUS").is_file():
        return [], [place]
    inner = sorted(Path(entry.path) for entry in os.scandir(place) if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")) \
        if deep and place.is_dir() and os.access(place, os.R_OK | os.X_OK) else []
    below = [_search(folder, deep - 1) for folder in inner]
    return [run for runs, _ in below for run in runs], [folder for _, begun in below for folder in begun]
