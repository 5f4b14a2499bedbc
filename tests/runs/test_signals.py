"""Signals, whenever they come, once or twice, to whichever rank: a checkpoint and exit code 75, or the end of the run, and never another result."""
import os
import signal
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import psutil
import pytest

from hpcfl.runs import signals
from hpcfl.settings.job import Job
from tests.support.fork_server import Forked
from tests.support.tiny_runs import apart, carry_out, deterministic, left_half_written, outcome, started, tiny, undisturbed, write_job

SENDINGS = (("SIGUSR1",), ("SIGTERM", "SIGTERM"), ("SIGINT",), ("SIGHUP", "SIGINT", "SIGUSR1"))
INTERRUPTED = """
import os, signal
from hpcfl.files import trees
from hpcfl.runs import checkpoint, launch
from hpcfl.federation.loop import Exchange
from hpcfl.runs.record import Record
from hpcfl.runs.simulation import Simulation
function, numbers = {owner}.{name}, {numbers}

def interrupted(*arguments, **named):
    while numbers:
        os.kill(os.getpid(), getattr(signal, numbers.pop()))
    return function(*arguments, **named)
{owner}.{name} = interrupted
"""
IN_THE_ROUND = {"start-up": "launch.World", "training": "Exchange.work", "server's work": "Exchange.serve", "evaluation": "Simulation._evaluate"}
BEHIND_IT = {"client states": "trees.write_trees", "record": "Record.write", "manifest": "checkpoint._seal", "pruning": "checkpoint._prune"}
WAITS = """
import os, sys, time
from pathlib import Path
rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))

def wait_here():
    Path(f"waiting-{rank}").touch()
    while not Path("go").exists():
        time.sleep(0.01)
"""
IN_THE_IMPORTS = WAITS + """
class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            wait_here()
sys.meta_path.insert(0, AtTorch())
"""
WHILE_RANK_1_TRAINS = WAITS + """
from hpcfl.federation.exchange import Exchange
work = Exchange.work

def work_late(self, verb, step, message, state, place, *rest):
    if rank == "1" and place.row == 1:
        wait_here()
    return work(self, verb, step, message, state, place, *rest)
Exchange.work = work_late
"""


def starts(folder: Path, path: Path, where: str) -> Iterator[tuple[int, str]]:
    """Exit code and output of start after start until one ends with another code than 75; each is sent signals when it first comes to a function."""
    owner, _, name = where.rpartition(".")
    for numbers in cycle(SENDINGS):
        run = Forked(folder, "run", path, "--out", folder / "run", fault=INTERRUPTED.format(owner=owner, name=name, numbers=list(numbers)))
        code = run.ends()
        yield code, run.text()
        if code != 75:
            return
        assert "a checkpoint is there, the same command goes on" in run.text() and (folder / "run" / "STATUS").read_text().startswith("stopped: ")


def same(folder: Path, whole: Path) -> None:
    """Whether a run ended as the one that nobody signalled."""
    assert not (found := apart(outcome(folder), outcome(whole))), "\n".join(found)
    assert (folder / "STATUS").read_text() == "done\n" and not left_half_written(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Job, Path]:
    """A job of four rounds in two phases, and its run."""
    job = deterministic(tiny("fedvtc", checkpoint={"every": 1, "keep": 1}, evaluation={"every": 1}))
    return job, carry_out(job, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("when", IN_THE_ROUND)
def test_a_signal_in_a_round_ends_the_run_behind_that_round(when, whole, tmp_path):
    found = list(starts(tmp_path, write_job(tmp_path, whole[0]), IN_THE_ROUND[when]))
    assert [code for code, _ in found] == [75, 75, 75, 0], found
    assert [f"resumed after round {rows} of 4" in text for rows, (_, text) in enumerate(found)] == [False, True, True, True], "a start was not one round"
    same(tmp_path / "run", whole[1])


@pytest.mark.parametrize("when", BEHIND_IT)
def test_a_signal_in_a_checkpoint_leaves_it_whole_and_ends_the_run_behind_the_next_round(when, whole, tmp_path):
    found = list(starts(tmp_path, write_job(tmp_path, whole[0]), BEHIND_IT[when]))
    assert [code for code, _ in found] == [75, 0] and "resumed after round 2 of 4" in found[1][1], found
    same(tmp_path / "run", whole[1])


@pytest.mark.parametrize(("rounds", "way_on"), [(0, "there is no checkpoint yet, the same command begins again"),
                                                (2, "the same command goes on from round-000002")])
def test_a_second_ctrl_c_ends_the_run_at_once_and_says_what_is_left(rounds, way_on, whole, tmp_path):
    folder, path = tmp_path / "run", write_job(tmp_path, whole[0])
    at_once = INTERRUPTED.format(owner="Exchange", name="work", numbers=["SIGINT", "SIGINT"])
    run = Forked(tmp_path, "run", path, "--out", folder, fault=at_once.replace("while numbers:", f"while numbers and arguments[5].row == {rounds}:"))
    assert run.ends() == 130, run.text()
    assert run.text().count("hpcfl: Ctrl-C: the run stops behind the round that it is in, with a checkpoint; Ctrl-C again ends it at once\n") == 1
    assert run.text().endswith(f"hpcfl: {folder}: interrupted from the keyboard; {way_on}\n") and "Traceback" not in run.text()
    assert (folder / "STATUS").read_text() == f"stopped: {folder}: interrupted from the keyboard; {way_on}\n"
    carry_out(whole[0], folder)
    same(folder, whole[1])


@pytest.mark.parametrize("number", signals.OF_A_TERMINAL)
def test_what_a_terminal_sends_stays_ignored_where_nohup_ignores_it(number):
    with undisturbed():
        signal.signal(number, signal.SIG_IGN)
        stop_requested = signals.listen()
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_IGN and not stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()


def test_ctrl_c_stops_the_ranks_that_hpcfl_has_started_itself_behind_their_round(whole, tmp_path):
    path = write_job(tmp_path, whole[0])
    with started(tmp_path, "run", path, "--out", tmp_path / "run", "--ranks", 2, fault=WHILE_RANK_1_TRAINS) as job:
        job.reaches("waiting-1")
        os.killpg(job.process.pid, signal.SIGINT)                  # as a terminal does
        time.sleep(0.5)                                            # mpirun passes signals on in its own time
        (tmp_path / "go").touch()
        assert job.ends() == 75 and "stopped on a signal after round 2 of 4" in job.text(), job.text()
    carry_out(whole[0], tmp_path / "run")
    same(tmp_path / "run", whole[1])


def test_ctrl_c_under_mpirun_kills_the_ranks_and_leaves_the_last_checkpoint(whole, tmp_path):
    """Open MPI gives its ranks half a second, and they cannot prevent it."""
    with started(tmp_path, "run", write_job(tmp_path, whole[0]), "--out", tmp_path / "run", ranks=2, fault=WHILE_RANK_1_TRAINS) as job:
        job.reaches("waiting-1")
        ranks = [job.rank(0), job.rank(1)]
        job.process.send_signal(signal.SIGINT)
        assert job.ends() not in (0, 75), job.text()
        assert not psutil.wait_procs(ranks, timeout=10)[1], "a rank outlived its launcher"
    assert (tmp_path / "run" / "LATEST").read_text() == "round-000001\n"
    carry_out(whole[0], tmp_path / "run")
    same(tmp_path / "run", whole[1])


def test_a_signal_in_every_round_of_every_phase_changes_no_result(tmp_path):
    job = tiny("gefl_f", algorithm={"generator": "vtc", "continued_rounds": 1}, checkpoint={"every": 1, "keep": 1}, evaluation={"every": 9})
    found = list(starts(tmp_path, write_job(tmp_path, job), "Exchange.work"))
    lines = [line.split()[1] for _, text in found for line in text.splitlines() if "/" in line.split()[0]]
    assert lines == ["warmup", "generator", "both", "targets", "targets"] and [code for code, _ in found] == [75] * 4 + [0], found
    same(tmp_path / "run", carry_out(job, tmp_path / "whole"))


def test_a_signal_before_torch_is_even_imported_is_not_lost(whole, tmp_path):
    with started(tmp_path, "run", write_job(tmp_path, whole[0]), "--out", tmp_path / "run", ranks=2, fault=IN_THE_IMPORTS) as job:
        job.reaches("waiting-0")
        job.reaches("waiting-1")
        job.rank(0).send_signal(signal.SIGTERM)
        for _ in range(2):
            job.rank(1).send_signal(signal.SIGUSR1)
        (tmp_path / "go").touch()
        assert job.ends() == 75 and "stopped on a signal after round 1 of 4" in job.text(), job.text()
    carry_out(whole[0], tmp_path / "run")
    same(tmp_path / "run", whole[1])


def test_a_signal_to_a_rank_that_waits_for_another_in_its_training_ends_both_behind_the_round(whole, tmp_path):
    with started(tmp_path, "run", write_job(tmp_path, whole[0]), "--out", tmp_path / "run", ranks=2, fault=WHILE_RANK_1_TRAINS) as job:
        job.reaches("waiting-1")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            job.rank(0).send_signal(number)
        (tmp_path / "go").touch()
        assert job.ends() == 75 and "stopped on a signal after round 2 of 4" in job.text(), job.text()
    carry_out(whole[0], tmp_path / "run")
    same(tmp_path / "run", whole[1])
