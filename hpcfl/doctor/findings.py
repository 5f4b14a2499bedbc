"""Findings: what a check of the doctor came to, and all the facts that a check may look at."""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hpcfl.doctor.estimate import Estimate
from hpcfl.doctor.probes import Facts
from hpcfl.doctor.run_folder import FolderFacts
from hpcfl.settings.job import Job
from hpcfl.wire.hockney import Timing
from hpcfl.wire.launchers import Launch

OK, WARNING, PROBLEM = "ok", "warning", "problem"                  # a problem: a run could not work, or by no means as it was meant


@dataclass(frozen=True)
class Finding:
    """What a check came to; `fix` says what to do where the verdict is not ok."""

    name: str
    verdict: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Examined:
    """All that was found out, as the server knows it."""

    ranks: int
    launch: Launch | None
    facts: tuple[Facts, ...]                                       # of the ranks that could tell
    silent: dict[int, str]                                         # the others, and why
    wire: Sequence[Timing]
    folder: FolderFacts
    job: Job | None = None
    job_faults: dict[int, str] | None = None                       # None where no job was given
    estimate: Estimate | None = None                               # of that job where it could begin

    def on(self, host: str) -> list[Facts]:
        """The ranks of a host."""
        return [facts for facts in self.facts if facts.host == host]

    def needs(self, facts: Facts) -> int:
        """Bytes that the job is estimated to need for a rank's clients; 0 where there is no estimate."""
        return self.estimate.loads[facts.rank].needed_bytes if self.estimate else 0


Check = Callable[[Examined], Finding | None]                       # None where there is nothing to say


def group_by_trait(facts: Iterable[Facts], trait: Callable[[Facts], str]) -> dict[str, list[int]]:
    """Trait -> the ranks that have it."""
    found: dict[str, list[int]] = {}
    for each in facts:
        found.setdefault(trait(each), []).append(each.rank)
    return found
