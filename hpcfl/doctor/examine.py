"""Doctor: what a run would meet where this was started: every rank looks around, wire and run folder are tried, and rank 0 gives its verdicts."""
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hpcfl
from hpcfl.algorithms import CONFIGS
from hpcfl.doctor import probes, run_folder
from hpcfl.doctor.estimate import Estimate, estimate
from hpcfl.doctor.findings import OK, PROBLEM, WARNING, Check, Examined, Finding
from hpcfl.doctor.launch_checks import LAUNCH_CHECKS, check_ranks
from hpcfl.doctor.run_checks import RUN_CHECKS
from hpcfl.errors import EnvironmentFault
from hpcfl.runs import launch
from hpcfl.settings.job import Job, load
from hpcfl.wire.communicator import Communicator, require_server
from hpcfl.wire.launchers import Launch
from hpcfl.wording import align_rows, byte_text, count_text, duration_text

CHECKS: tuple[Check, ...] = (*LAUNCH_CHECKS, *RUN_CHECKS)
WIDTH = 150                                                        # columns at most, and where there is no terminal


def examine(comm: Communicator, told: Launch | None, job_file: Path | None, overrides: Sequence[str], out: Path | None) -> Examined | None:
    """What there is to know of a launch, and with a job file of that job in it; known at the server, called by all ranks.

    `told`: what the launcher says. A rank on which something fails still takes part in every collective; the server learns what failed.
    """
    job, fault = probes.attempt(load, job_file, CONFIGS, overrides) if job_file else (None, "")
    facts, silent = gather_values(comm, *probes.attempt(probes.look_around, comm, job.run.device if job else "auto", launch.count_cores(comm)))
    wire = comm.share(probes.time_wire(comm))
    folder = run_folder.examine(comm, out or Path("runs"))
    _, faults = gather_values(comm, None, fault)
    faults |= {each.rank: each.device_fault for each in facts if each.device_fault}
    guess = None
    if job_file and not comm.agree(bool(faults or silent)) and job is not None:
        guess, faults = estimate_job(comm, job, wire)
    if not comm.is_server:
        return None
    return Examined(comm.size, told, tuple(facts), silent, wire, require_server(folder), job, faults if job_file else None, guess)


def gather_values(comm: Communicator, value: Any, fault: str) -> tuple[list[Any], dict[int, str]]:
    """At the server the values of the ranks that have one, and by rank the faults of the others; called by all ranks."""
    answers = comm.gather((value, fault)) or []
    return [value for value, fault in answers if not fault], {rank: fault for rank, (_, fault) in enumerate(answers) if fault}


def estimate_job(comm: Communicator, job: Job, wire: Sequence[dict[str, Any]]) -> tuple[Estimate | None, dict[int, str]]:
    """A round of the job with the threads and devices that its ranks would have; called by all ranks."""
    launch.set_threads(job, comm)
    device, fault = probes.attempt(launch.choose_job_device, job, comm)
    _, faults = gather_values(comm, None, fault)
    return (None, faults) if comm.agree(bool(fault)) else estimate(comm, job, device, wire)


def list_findings(examined: Examined) -> list[Finding]:
    """What every check came to that has something to say."""
    checks = CHECKS if examined.facts else (check_ranks,)
    return [finding for check in checks if (finding := check(examined)) is not None]


def choose_exit_code(found: Sequence[Finding]) -> int:
    """That of the process: 0 where a run could work."""
    return EnvironmentFault.exit_code if any(finding.verdict == PROBLEM for finding in found) else 0


def describe_findings(examined: Examined, found: Sequence[Finding]) -> dict[str, Any]:
    """Everything as plain data, units in the key names."""
    estimate = examined.estimate and asdict(examined.estimate) | {"wire_share": examined.estimate.wire_share}
    return {"hpcfl": hpcfl.__version__, "verdict": find_worst(found), "exit_code": choose_exit_code(found), "ranks": examined.ranks,
            "findings": [asdict(finding) for finding in found], "launch": examined.launch and asdict(examined.launch),
            "by_rank": [asdict(facts) for facts in examined.facts], "silent": examined.silent, "wire": list(examined.wire),
            "folder": asdict(examined.folder), "job": examined.job and examined.job.tables(), "estimate": estimate}


def find_worst(found: Sequence[Finding]) -> str:
    """The verdict over all findings."""
    return next(verdict for verdict in (PROBLEM, WARNING, OK) if verdict == OK or any(finding.verdict == verdict for finding in found))


def render(examined: Examined, found: Sequence[Finding]) -> str:
    """Findings for people: a line or a few each, the fix below; then the figures of the wire, and how many findings there are of each kind."""
    width = min(shutil.get_terminal_size((WIDTH, 1)).columns, WIDTH)
    indent = " " * 25
    lines = []
    for finding in found:
        head = f"{finding.verdict:<8} {finding.name:<15} "
        lines += textwrap.wrap(finding.text, width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)
        if finding.fix and finding.verdict != OK:
            lines += textwrap.wrap(f"-> {finding.fix}", width, initial_indent=indent, subsequent_indent=indent + "   ", break_on_hyphens=False)
    counts = {verdict: sum(finding.verdict == verdict for finding in found) for verdict in (PROBLEM, WARNING)}
    last = f"hpcfl doctor, {count_text(examined.ranks, 'rank')}: {count_text(counts[PROBLEM], 'problem')}, {count_text(counts[WARNING], 'warning')}" + \
           ("; mend the problems before a run" if counts[PROBLEM] else "")
    return "\n".join([*lines, "", *wire_lines(examined.wire), last])


def wire_lines(wire: Sequence[dict[str, Any]]) -> list[str]:
    """Medians by size and collective."""
    names, sizes = (list(dict.fromkeys(row[key] for row in wire)) for key in ("collective", "rank_bytes"))
    took = {(row["collective"], row["rank_bytes"]): duration_text(row["median_s"]) for row in wire}
    return [align_rows([("of each rank", *names), *((byte_text(each), *(took[name, each] for name in names)) for each in sizes)], words=0), ""] if wire else []
