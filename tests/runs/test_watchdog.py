"""A rank that does not arrive is named and ends the job, with a checkpoint behind it; and a long round is heard of."""
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcfl.errors import RankMissing
from hpcfl.runs.watchdog import APART, RECENT, TOGETHER, Watchdog, Watched, _waiting_text, watching
from hpcfl.wire.communicator import Alone, Communicator
from hpcfl.wire.ranks import Ranks
from tests.support.tiny_runs import apart, carry_out, deterministic, outcome, started, tiny, write_job

STAYS_AWAY = """
import os, time
from pathlib import Path
from hpcfl.algorithms.standalone import Standalone
train = Standalone.train

def stay_away():
    {how}

def stumble(self, group, message, site):
    if site.round == 2 and os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "{rank}":
        Path("away").touch()
        stay_away()
    return train(self, group, message, site)
Standalone.train = stumble
"""
AWAY = {"sleeps": "time.sleep(1000)", "never lets go of Python": "import ctypes; ctypes.PyDLL(None).sleep(1000)"}
LIMIT = 5.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A job of three rounds with a limit, and a run of it that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    job = deterministic(tiny("standalone", federation={"participation": 1.0}, checkpoint={"every": 1}, timeouts={"collective": LIMIT}))
    return job, write_job(folder, job), carry_out(job, folder / "run")


def ends_with_a_name(whole, folder: Path, job, since: float, rank: int = 1) -> str:
    """What a job prints that ends because a rank stays away; the run goes on from its last checkpoint."""
    assert job.ends() == RankMissing.exit_code == 7, job.text()
    assert time.monotonic() - since < 20
    assert (folder / "STATUS").read_text().startswith(f"failed: timeouts.collective = {LIMIT:g} s is over: rank {rank} did not arrive")
    assert (folder / "LATEST").read_text() == "round-000002\n"
    text = " ".join(job.text().split())
    assert text.count("is over") == 1 and f"{_waiting_text([1 - rank, 2])} in barrier (hpcfl/federation/exchange.py:" in text
    assert "its last checkpoint is round-000002, and the same command goes on from there" in text
    for other in (1 - rank, 2):
        assert "in wait" in (folder / "log" / f"rank-{other:04d}.stack").read_text()
    carry_out(whole[0], folder)
    assert not apart(outcome(folder), outcome(whole[2]))
    return text


@pytest.mark.parametrize(("how", "rank"), [("sleeps", 1), ("sleeps", 0), ("never lets go of Python", 1)])
def test_a_rank_that_does_not_arrive_is_named_and_every_rank_says_where_it_is(how, rank, whole, tmp_path):
    folder = tmp_path / "run"
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=3, fault=STAYS_AWAY.format(how=AWAY[how], rank=rank)) as job:
        job.reaches("away")
        text = ends_with_a_name(whole, folder, job, time.monotonic(), rank)
    assert "in stay_away" in (folder / "log" / f"rank-{rank:04d}.stack").read_text(), "the stack of the missing rank"
    if how == "sleeps":
        assert re.search(rf"rank {rank} did not arrive: for \d+\.\d s, since its last \w+, it has been at work in hpcfl/federation/exchange.py:\d+ \w+", text)
        assert f"rank {rank}: the others wait for this rank, which is here:" in text and "in stay_away" in text
    else:
        assert "rank 1 did not arrive and gives no sign: it is gone, stopped, or inside one call that does not let go of Python" in text


def test_a_rank_that_is_stopped_gives_no_sign(whole, tmp_path):
    folder = tmp_path / "run"
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=3, fault=STAYS_AWAY.format(how=AWAY["sleeps"], rank=1)) as job:
        job.reaches("away")
        job.rank(1).send_signal(signal.SIGSTOP)
        assert "rank 1 did not arrive and gives no sign" in ends_with_a_name(whole, folder, job, time.monotonic())


def test_a_run_without_trouble_leaves_nothing_of_the_watchdog(whole, tmp_path):
    with started(tmp_path, "run", whole[1], "--set", "timeouts.collective=60", "--out", tmp_path / "run", ranks=2) as job:
        assert job.ends() == 0, job.text()
    assert not list((tmp_path / "run" / "log").glob("*.stack")) and not list((tmp_path / "run" / "watchdog").iterdir())
    assert not apart(outcome(tmp_path / "run"), outcome(whole[2]))


def test_the_limits_differ_freely_when_a_run_goes_on(whole, tmp_path):
    job = tiny("standalone", federation={"participation": 1.0}, checkpoint={"every": 2, "keep": 5}, timeouts={"collective": 60.0, "heartbeat": 0.0})
    carry_out(job, tmp_path / "resumed", resume=whole[2] / "checkpoints" / "round-000002", may_differ=["run.deterministic"])


class Waiting(Alone):
    """Rank 0 of three, the others of which never answer."""

    def __init__(self):
        super().__init__()
        self.size = 3
        self.aborted, self.released, self.barriers = [], threading.Event(), 0

    def barrier(self):
        """The first is that of the watchdog's own beginning."""
        self.barriers += 1
        if self.barriers > 1:
            self.released.wait(30)

    def abort(self, code):
        self.aborted.append(code)
        self.released.set()

    def gather(self, value):
        """The others would say the same."""
        return [value] * self.size

    def bcast(self, value):
        return value

    allgather = send = receive = any = among = bcast_lines = gather_lines = send_lines = receive_lines = reduce = lambda self, *_: None


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("hpcfl.runs.watchdog.GRACE_S", (0.2, 0.2))


def test_ranks_that_say_nothing_are_all_missing_and_the_run_may_have_no_checkpoint(quick, tmp_path):
    engine, told = Waiting(), []
    comm = Communicator(engine)
    with watching(comm, tmp_path, 0.3, told.append):
        comm.barrier()
    assert engine.aborted == [7] and len(told) == 1
    assert all(f"rank {rank} did not arrive and gives no sign" in told[0] for rank in (1, 2)) and "it has no checkpoint yet" in told[0]
    assert comm._ranks is engine


def test_a_rank_that_arrives_before_the_end_of_the_grace_and_ends_the_run_is_forgiven(monkeypatch, tmp_path):
    monkeypatch.setattr("hpcfl.runs.watchdog.GRACE_S", (20.0, 20.0))
    engine, told = Waiting(), []
    comm = Communicator(engine)
    with watching(comm, tmp_path, 0.3, told.append):
        threading.Timer(1.0, engine.released.set).start()
        comm.barrier()
    assert not engine.aborted and not told and (tmp_path / "watchdog" / "rank-0000.json").exists()


def test_an_old_alarm_is_no_alarm(quick, tmp_path):
    (tmp_path / "watchdog").mkdir()
    (tmp_path / "watchdog" / "rank-0001.json").write_text("{}")
    engine = Waiting()
    with watching(Communicator(engine), tmp_path, 2.0, print):
        time.sleep(0.5)
    assert not engine.aborted


def waiting_in(*calls: str, began: int = 0, at: str = "a") -> dict:
    """What a rank says that waits in the last of these calls."""
    return {"inside": True, "call": calls[-1], "at": at, "together": [began + len(calls), list(calls)]}


def verdict(folder: Path, hosts: list[str], *said: dict) -> str:
    guard = Watchdog(Communicator(Waiting()), folder, 9.0, print)
    guard.hosts = hosts
    return guard.verdict_text(dict(enumerate(said)))


def test_ranks_that_wait_for_each_other_in_different_calls_are_told_apart(tmp_path):
    text = verdict(tmp_path, ["n1"] * 3, waiting_in("bcast", "barrier"), waiting_in("bcast", "bcast", at="b"), waiting_in("bcast", "barrier"))
    assert "no rank is missing: they wait for each other in different calls. Ranks 0 to 2 wait in barrier (a), bcast (b)" in text
    parted = verdict(tmp_path, ["n1"] * 3, waiting_in("any", "barrier"), waiting_in("bcast", "gather", "gather", began=-1), waiting_in("any", "barrier"))
    assert "in different calls" in parted                          # one of them is ahead, and came there on another way
    assert _waiting_text([0, 1, 2, 5, 7, 8]) == "Ranks 0 to 2, 5, 7 to 8 wait" and _waiting_text([3]) == "Rank 3 waits"


@pytest.mark.parametrize("far", [waiting_in("any", "barrier"), waiting_in("any", "barrier", "gather"), waiting_in(*["gather"] * 40, began=90)],
                         ids=["the same call", "the next call", "far ahead"])
def test_where_all_made_the_same_calls_the_hosts_are_named_between_which_a_message_is_lost(far, tmp_path):
    text = verdict(tmp_path, ["near", "near", "far"], waiting_in("any", "barrier"), waiting_in("any", "barrier"), far)
    assert ("no rank is missing: they made the same calls, and a message between the hosts near (ranks 0-1) and far (rank 2) does not arrive: "
            "see to the network between them. Ranks 0 to 2 wait in ") in text and "different" not in text
    assert text.endswith("If mpirun does not end, it cannot reach a host: end it by hand (Ctrl-C three times), the run has ended")


def test_a_message_may_be_lost_on_one_host_too(tmp_path):
    text = verdict(tmp_path, ["n1"] * 3, *[waiting_in("any", "barrier")] * 3)
    assert "a message between them does not arrive, on the host n1 (ranks 0-2). " in text and "mpirun" not in text


def test_a_rank_that_gives_no_sign_may_be_on_a_host_that_is_down(tmp_path):
    text = verdict(tmp_path, ["near", "far", "far"], waiting_in("barrier"), waiting_in("barrier"))
    assert "rank 2 did not arrive and gives no sign" in text and "does not let go of Python, or its host far or the network to it is down. " in text


def test_calls_to_others_are_counted_and_errors_pass_through():
    engine = Waiting()
    engine.receive = lambda source: json.loads("{")
    watched = Watched(engine)
    assert watched.state[:3] == (0, "the start", False) and watched.size == 3
    watched.bcast(None)
    assert watched.state[:3] == (1, "bcast", False) and watched.together == (1, ("bcast",))
    with pytest.raises(ValueError):
        watched.receive(1)
    assert watched.state[:3] == (2, "receive", False) and watched.together == (1, ("bcast",)), "only two ranks take part in it"
    for _ in range(RECENT):
        watched.any(False)
    assert watched.together == (1 + RECENT, ("any",) * RECENT)


def test_every_call_that_a_communicator_makes_is_watched():
    """A call that is not in the lists would hang unseen; those that two ranks make alone are no step of all, and an abort waits for nobody."""
    lists = {*TOGETHER, *APART}
    made = {name for name in vars(Ranks) if not name.startswith("_")} | {"bcast", "gather", "allgather", "send", "barrier"}
    assert made - lists == {"collectives", "abort"} and not {*TOGETHER} & {*APART}


def test_without_a_limit_or_other_ranks_nothing_is_watched(tmp_path):
    for comm, limit in ((Communicator(Waiting()), 0.0), (Communicator(Alone()), 5.0)):
        engine = comm._ranks
        with watching(comm, tmp_path, limit, print):
            assert comm._ranks is engine and not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_long_round_of_a_run_says_what_it_spends_its_time_on(tmp_path):
    path = write_job(tmp_path, tiny("standalone", federation={"participation": 1.0}, timeouts={"heartbeat": 0.5}))
    fault = STAYS_AWAY.format(how="time.sleep(2.5)", rank=1).replace("get(\"PMI_RANK\")", "get(\"PMI_RANK\", \"1\")")
    with started(tmp_path, "run", path, "--out", tmp_path / "run", fault=fault) as job:
        assert job.ends() == 0, job.text()
    assert re.search(r"3/3  rounds: \d s so far \(train \d\.\d s", job.text()), job.text()


def test_the_process_ends_even_where_the_abort_hangs(tmp_path):
    code = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
import hpcfl.runs.watchdog
from hpcfl.wire.communicator import Communicator
from tests.runs.test_watchdog import Waiting
hpcfl.runs.watchdog.GRACE_S = (0.2, 0.2)
engine = Waiting()
engine.abort = lambda code: time.sleep(1000)
comm = Communicator(engine)
with hpcfl.runs.watchdog.watching(comm, Path({folder!r}), 0.3, print):
    comm.barrier()
"""
    command = [sys.executable, "-c", code.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1 and "timeouts.collective = 0.3 s is over" in ended.stderr and "Timeout" in ended.stderr
