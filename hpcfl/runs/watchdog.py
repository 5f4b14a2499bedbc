"""Watchdog: where a rank does not arrive for whom the others wait, it is named, every rank says where it is, and the job ends."""
import faulthandler
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hpcfl
from hpcfl.errors import RankMissing
from hpcfl.wire.communicator import Communicator
from hpcfl.wording import numbers_text

TOGETHER = ("bcast", "gather", "allgather", "barrier", "any", "among", "gather_lines")   # calls that all ranks make, in the same order
APART = ("send", "receive", "bcast_lines", "send_lines", "receive_lines", "reduce")      # those in which some may have no part
RECENT = 32                                                        # of the calls that all ranks make, the last by which ranks are compared
FOLDER = "watchdog"                                                # in the run folder: what the ranks say once one has raised the alarm
PERIOD_S = (0.05, 10.0)                                            # bounds of the time between two looks, a twentieth of the limit
GRACE_S = (2.0, 60.0)                                              # bounds of the time that all have to say where they are, a quarter of the limit


class Watched:
    """The ranks of a Communicator, noting when a call to the others begins and ends.

    `state` is (calls begun, name of the last, whether inside it, since when); `together` is (those begun that all ranks make, names of the last RECENT).
    """

    together: tuple[int, tuple[str, ...]]

    def __init__(self, ranks: Any):
        self._ranks, self.state, self.together = ranks, (0, "the start", False, time.monotonic()), (0, ())
        for name in (*TOGETHER, *APART):
            setattr(self, name, partial(self._call, name, getattr(ranks, name)))

    def _call(self, name: str, call: Callable, *arguments: Any, **named: Any) -> Any:
        number = self.state[0] + 1
        if name in TOGETHER:
            count, names = self.together
            self.together = count + 1, (*names, name)[-RECENT:]
        self.state = (number, name, True, time.monotonic())        # one assignment: another thread reads it
        try:
            return call(*arguments, **named)
        finally:
            self.state = (number, name, False, time.monotonic())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ranks, name)


class Watchdog:
    """A thread of one rank; made by all ranks together.

    The thread makes no MPI call but the abort: ranks that wait cannot answer, so they leave each other files in the run folder.
    """

    def __init__(self, comm: Communicator, folder: Path, limit_s: float, last_words: Callable[[str], None]):
        self.comm, self.folder, self.limit_s, self.last_words = comm, folder, limit_s, last_words
        self.hosts: list[str] = comm.share(comm.gather(platform.node()))                 # of all ranks
        self.period_s, self.grace_s = (min(max(low, limit_s / part), high) for (low, high), part in ((PERIOD_S, 20), (GRACE_S, 4)))
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch over the calls of the block. Called by all ranks."""
        if self.comm.is_server:
            shutil.rmtree(self.folder / FOLDER, ignore_errors=True)                      # of an earlier alarm
            (self.folder / FOLDER).mkdir()
            (self.folder / "log").mkdir(exist_ok=True)
        self.comm.barrier()
        path = self.folder / "log" / f"rank-{self.comm.rank:04d}.stack"
        with path.open("w", encoding="utf-8") as self.stack, self.comm.watched(Watched) as self.watched:
            self.thread.start()
            try:
                yield
            finally:
                self.over.set()
                self.thread.join()
                faulthandler.cancel_dump_traceback_later()
        if path.stat().st_size == 0:
            path.unlink()

    def watch(self) -> None:
        """Until the block is over, or until somebody has waited for too long."""
        while not self.over.wait(self.period_s):
            # The interpreter's own timer, set anew each time: it writes the stack also where this thread cannot, because one call does not let go of Python.
            faulthandler.dump_traceback_later(self.limit_s / 2, file=self.stack)
            _, _, inside, since = self.watched.state
            if (inside and time.monotonic() - since > self.limit_s) or self.others_alarmed():
                self.alarm()
                return

    def others_alarmed(self) -> bool:
        """Whether any rank has said where it is."""
        try:
            return any((self.folder / FOLDER).iterdir())           # the list of names, not one name: network file systems remember what was not there
        except OSError:                                            # a file system that fails for a moment is no alarm
            return False

    def alarm(self) -> None:
        """Say where this rank is, give the others time to do so, and end the job.

        The first of those who wait speaks; if it does not, the others do, and last the missing.
        """
        # Should any of this hang as well, a file system or the abort, the interpreter's timer ends this process.
        faulthandler.dump_traceback_later(8 * self.grace_s, exit=True, file=sys.__stderr__)  # type: ignore[arg-type]  # outlets opens it
        own = self.testify()
        for graces in range(1, 4):
            if self.over.wait(self.grace_s):
                return                                             # everybody came after all, and to the end
            said = self.read_testimonies() | {self.comm.rank: own}
            first = min((rank for rank, each in said.items() if each["inside"]), default=self.comm.rank)
            if graces == 3 or (own["inside"] and (graces == 2 or self.comm.rank == first)):
                break
        text = self.verdict_text(said)
        print(f"hpcfl: rank {self.comm.rank}: {text}", file=sys.stderr, flush=True)
        self.last_words(text)
        self.comm.abort(RankMissing.exit_code)

    def testify(self) -> dict[str, Any]:
        """Where this rank is and whether it waits for others, for all to read, with its stack."""
        number, name, inside, since = self.watched.state
        faulthandler.dump_traceback(self.stack)
        if not inside:
            print(f"hpcfl: rank {self.comm.rank}: the others wait for this rank, which is here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.__stderr__)  # type: ignore[arg-type]  # as above
        told = {"inside": inside, "call": name, "number": number, "together": self.watched.together, "seconds": time.monotonic() - since, "at": _find_place()}
        path = self.folder / FOLDER / f"rank-{self.comm.rank:04d}.json"
        try:
            path.with_suffix(".part").write_text(json.dumps(told), encoding="utf-8")
            os.replace(path.with_suffix(".part"), path)
        except OSError as error:                                   # a full disk: this rank will be named as giving no sign, and the job must end all the more
            print(f"hpcfl: rank {self.comm.rank}: {path}: could not be written: {error.strerror}", file=sys.stderr, flush=True)
        return told

    def read_testimonies(self) -> dict[int, dict[str, Any]]:
        """What the ranks have said so far."""
        return {int(path.stem[5:]): json.loads(path.read_bytes()) for path in (self.folder / FOLDER).glob("rank-*.json")}

    def verdict_text(self, said: dict[int, dict[str, Any]]) -> str:
        """Who is missing where, in words."""
        waiting = {rank: each for rank, each in sorted(said.items()) if each["inside"]}
        missing = [rank for rank in range(self.comm.size) if rank not in waiting]
        calls = sorted({f"{each['call']} ({each['at']})" for each in waiting.values()})
        latest = self.folder / "LATEST"
        last = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
        checkpoint = f"its last checkpoint is {last}, and the same command goes on from there" if last else "it has no checkpoint yet"
        found = "; ".join(f"rank {rank} {self.absence_text(rank, said.get(rank))}" for rank in missing) or f"no rank is missing: {self.split_text(said)}"
        return (f"timeouts.collective = {self.limit_s:g} s is over: {found}. "
                f"{_waiting_text(waiting)} in {', '.join(calls)}. The stacks are in {self.folder / 'log'}/rank-*.stack. "
                f"The run is ended; {checkpoint}. If all this is only slow, raise timeouts.collective" + self.launcher_text())

    def absence_text(self, rank: int, told: dict[str, Any] | None) -> str:
        """What keeps a rank that is missing, in words."""
        if told:
            return f"did not arrive: for {told['seconds']:.1f} s, since its last {told['call']}, it has been at work in {told['at']}"
        gone = f", or its host {self.hosts[rank]} or the network to it is down" if len(set(self.hosts)) > 1 else ""
        return f"did not arrive and gives no sign: it is gone, stopped, or inside one call that does not let go of Python{gone}"

    def split_text(self, said: dict[int, dict[str, Any]]) -> str:
        """Why ranks wait that are all there, in words: where all made the same calls so far, what one of them sent has not come to another."""
        first, *others = (each["together"] for each in said.values())
        if not all(_in_step(first, other) for other in others):
            return "they wait for each other in different calls"
        found: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            found.setdefault(host, []).append(rank)
        names = [f"{host} ({numbers_text(ranks)})" for host, ranks in found.items()]
        if len(names) == 1:
            return f"they made the same calls, and a message between them does not arrive, on the host {names[0]}"
        return f"they made the same calls, and a message between the hosts {', '.join(names[:-1])} and {names[-1]} does not arrive: " \
               "see to the network between them"

    def launcher_text(self) -> str:
        """What to do about a launcher that cannot reach its daemon on another host, and waits for that."""
        return ". If mpirun does not end, it cannot reach a host: end it by hand (Ctrl-C three times), the run has ended" if len(set(self.hosts)) > 1 else ""


@contextmanager
def watching(comm: Communicator, folder: Path, limit_s: float, last_words: Callable[[str], None]) -> Iterator[None]:
    """Inside the block no rank waits for longer than `limit_s` for another (0: for ever); `last_words` is told why before the job is aborted.

    Called by all ranks. What cannot be seen: a rank that computes on and on inside a limit of its own making, and on a network file system what other
    nodes write only when they see it; a rank whose word comes late, or never, is named as giving no sign.
    """
    if limit_s == 0 or comm.size == 1:
        yield
        return
    with Watchdog(comm, folder, limit_s, last_words).watching():
        yield


def _in_step(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two ranks made the same calls, as far as both remember; one may be ahead, for who only sends need not wait."""
    here, there = (dict(enumerate(names, count - len(names))) for count, names in (one, other))
    return all(here[number] == there[number] for number in here.keys() & there.keys())


def _waiting_text(ranks: Collection[int]) -> str:
    """Which ranks wait, as a sentence begins: "Ranks 0 to 3, 7 wait"."""
    return f"{numbers_text(ranks, 'Rank', ' to ') if ranks else 'Rank unknown'} wait{'s' * (len(ranks) < 2)}"


def _find_place() -> str:
    """Where in hpcfl the main thread is: the innermost of its frames that is ours, the calls to other ranks left out."""
    frame, ours = sys._current_frames().get(threading.main_thread().ident or 0), Path(hpcfl.__file__).parent
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ours) and path.parent != ours / "wire" and path.name != "watchdog.py":
            return f"{path.relative_to(ours.parent)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "no place in hpcfl"
