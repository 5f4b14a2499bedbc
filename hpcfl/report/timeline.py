"""timeline: when each rank did what, as a file for ui.perfetto.dev or chrome://tracing (the JSON of Chrome's trace events)."""
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcfl.errors import JobError
from hpcfl.files.atomic import replacing
from hpcfl.report.recording import Recording, read

ROUNDS = 0                                                         # the row of the rounds, above those of the ranks


def write(runs: Sequence[str | Path], path: Path) -> Path:
    """Write the intervals of the runs to one file, a process for each run, a row for its rounds and for each rank; returns the path.

    Raises: as `recording.read`, before anything is written; JobError for a run without intervals or where the file cannot be written.
    """
    found = [event for process, run in enumerate(dict.fromkeys(Path(run) for run in runs)) for event in list_events(read(run), process)]
    with replacing(path, lambda error: JobError(f"{path}: cannot write the trace: {error.strerror or error}; name another file with --trace FILE")) as draft:
        draft.write(json.dumps({"displayTimeUnit": "ms", "traceEvents": found}).encode())
    return path


def list_events(recording: Recording, process: int = 0) -> Iterator[dict[str, Any]]:
    """The trace events of one run, times in microseconds since its first round; the time between a stop and the restart is left out.

    Raises: JobError for a run that an earlier version recorded.
    """
    table = recording.datasets("trace")
    if "row" not in table:
        raise JobError(f"{recording.folder}: its metrics.h5 says for how long each rank worked, but not when; it was written by an earlier hpcfl")
    yield _name_event("process_name", process, ROUNDS, f"{recording.name} ({recording.algorithm}, seed {recording.seed})")
    names = {ROUNDS: "rounds", **{int(rank) + 1: f"rank {rank}" for rank in np.unique(table["rank"])}}
    for thread, name in names.items():
        yield _name_event("thread_name", process, thread, name)
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}}
    places = list(zip(recording.arrays["rounds/phase"].tolist(), recording.arrays["rounds/round"].tolist(), strict=True))
    begin, end = 1e6 * table["start_s"], 1e6 * (table["start_s"] + table["duration_s"])
    for row in np.unique(table["row"]).tolist():
        (phase, round_), inside = places[row], table["row"] == row
        yield _event(f"{phase} {round_ + 1}", "round", process, ROUNDS, begin[inside].min(), end[inside].max(), {"round": row + 1})
    for kind, rank, row, since, until in zip(table["kind"].tolist(), table["rank"].tolist(), table["row"].tolist(), begin, end, strict=True):
        yield _event(str(table["kinds"][kind]), "work", process, rank + 1, since, until, {"round": row + 1, "phase": places[row][0]})


def _event(name: str, category: str, process: int, thread: int, since: float, until: float, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "pid": process, "tid": thread, "ts": round(float(since), 1), "dur": round(float(until - since), 1),
            "args": arguments}


def _name_event(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
