"""Allotment: what of its host a process may use: processor time and memory, as control groups, the launcher and SLURM leave them to it."""
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from hpcfl.settings.sections import Run
from hpcfl.wire.launchers import parse_whole_number

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")                             # lines "number:controllers:path", no controllers in version 2
TASKS = Path("/proc/self/task")
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))      # of versions 2 and 1


def choose_threads(run: Run, cores: float, limit: float) -> int:
    """Of a rank that has so many cores and may start so many: run.threads, else one where the same bits are promised, else one for each core."""
    return run.threads or (1 if run.deterministic else max(1, int(min(cores, limit))))


def read_thread_limit(environment: Mapping[str, str] = os.environ) -> float:
    """How many threads OMP_NUM_THREADS allows a process; infinite where it says nothing."""
    return parse_whole_number(environment.get("OMP_NUM_THREADS", "").partition(",")[0]) or math.inf       # "4,2" is for levels, of which there is one


def read_quota_cores() -> float:
    """Processor time that this process's control groups grant, in cores; infinite where they grant all there is."""
    found = [math.inf]
    for folder in find_control_groups("cpu"):
        quota, period = [*_read_words(folder / "cpu.max"), *_read_words(folder / "cpu.cfs_quota_us"), *_read_words(folder / "cpu.cfs_period_us"), "", ""][:2]
        if quota.isdigit() and period.isdigit():                   # else "max", or -1
            found.append(int(quota) / int(period))
    return min(found)


def read_launcher_cores(environment: Mapping[str, str] = os.environ) -> int:
    """The cores of this host that whoever started this process could have given to it."""
    try:
        allowed = len(psutil.Process().parent().cpu_affinity())
    except (AttributeError, psutil.Error):                         # no such thing on this system, or a parent that is gone or somebody else's
        allowed = os.cpu_count() or 1
    return min(allowed, parse_whole_number(environment.get("SLURM_CPUS_ON_NODE")) or allowed)


def read_memory_left_bytes() -> int:
    """Memory that this host, or a control group of this process, still has to give; what the group only keeps of files counts as free."""
    left = [psutil.virtual_memory().available]
    for folder in find_control_groups("memory"):
        for limit, used in LIMITS:
            numbers = _read_words(folder / limit), _read_words(folder / used)
            if all(number and number[0].isdigit() for number in numbers):
                lines = dict(line.split() for line in _read_text(folder / "memory.stat").splitlines())
                left.append(int(numbers[0][0]) - int(numbers[1][0]) + int(lines.get("total_inactive_file", lines.get("inactive_file", 0))))
    return max(0, min(left))


def read_core_seconds() -> tuple[float, float]:
    """Seconds that the threads of this process have had a core, and that they were ready and waited for one; nothing where the system does not tell."""
    told = [words for task in TASKS.glob("*") if len(words := _read_words(task / "schedstat")) > 1]
    return sum(int(words[0]) for words in told) / 1e9, sum(int(words[1]) for words in told) / 1e9


def find_control_groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups, from its own up to the root."""
    for line in _read_text(OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = GROUPS / controller if controllers else GROUPS
            own = root / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _read_words(file: Path) -> list[str]:
    return _read_text(file).split()


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:                                                # a container shows its processes fewer folders than it names
        return ""
