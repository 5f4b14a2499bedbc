"""An error on any rank ends the whole job soon, with one message and an exit code of its own."""
import re
import time

import pytest

from hpcfl.contract import ClientSite
from hpcfl.errors import CheckpointError, DataError, EnvironmentFault, JobError, Stopped
from hpcfl.runs.guard import run_guarded
from tests.support.faults import RANK
from tests.support.tiny_runs import started, tiny, write_job

RAISES = RANK + """
from hpcfl.algorithms.standalone import Standalone
train = Standalone.train

def stumble(self, group, message, site):
    if site.round == 1 and rank == "{rank}":
        Path("raised").touch()
        raise ZeroDivisionError("broken on purpose")
    return train(self, group, message, site)
Standalone.train = stumble
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_all_within_seconds_with_its_own_traceback(rank, tmp_path):
    path = write_job(tmp_path, tiny("standalone", federation={"participation": 1.0}))
    with started(tmp_path, "run", path, "--out", tmp_path / "run", ranks=3, fault=RAISES.format(rank=rank)) as job:
        job.reaches("raised")
        since = time.monotonic()
        assert job.ends() == 1 and time.monotonic() - since < 5, job.text()
        text = job.text()
    assert f"hpcfl: rank {rank}: Traceback" in text and text.count("hpcfl: rank") == 1
    assert "ZeroDivisionError: broken on purpose" in text and ", in stumble" in text
    assert re.fullmatch(rf"failed: ZeroDivisionError on rank {rank}, clients? [\d, -]+: broken on purpose\n", (tmp_path / "run" / "STATUS").read_text())


def test_what_all_ranks_find_wrong_is_said_once_and_mpirun_returns_the_code(tmp_path):
    path = write_job(tmp_path, tiny("standalone"))
    with started(tmp_path, "run", path, "--set", "training.momentun=0.9", "--out", tmp_path / "run", ranks=3) as job:
        assert job.ends() == 2, job.text()
    assert job.text().count("unknown key training.momentun; did you mean 'momentum'?") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("engine", "whom"), [("sequential", "client 3"), ("vmap", "clients 1, 3")])
def test_the_status_after_an_exception_names_type_rank_and_client(engine, whom, hpcfl, tmp_path, monkeypatch):
    epochs = ClientSite.epochs

    def broken(self, client, *passes):
        for each in epochs(self, client, *passes):
            if client == 3:
                raise RuntimeError("boom")
            yield each
    monkeypatch.setattr(ClientSite, "epochs", broken)
    job = tiny("standalone", federation={"participation": 1.0}, training={"engine": engine})
    code, text = hpcfl("run", write_job(tmp_path, job), "--out", tmp_path / "run")
    assert code == 1 and "RuntimeError: boom" in text
    assert (tmp_path / "run" / "STATUS").read_text() == f"failed: RuntimeError on rank 0, {whom}: boom\n"


class Rank:
    """A communicator of which only rank and size are asked, and which remembers its abort."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.is_server, self.aborted = rank, size, rank == 0, None

    def abort(self, code: int) -> None:
        self.aborted = code


@pytest.mark.parametrize(("error", "code"), [(JobError("no such key"), 2), (EnvironmentFault("no GPU"), 3), (DataError("no file"), 4),
                                             (CheckpointError("full"), 5), (KeyboardInterrupt(), 130), (ZeroDivisionError("oh"), 1)],
                         ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_each_kind_of_error_has_its_exit_code_and_one_message_that_names_the_rank_of_several(error, code, rank, size, capsys):
    def fail() -> int:
        raise error
    comm = Rank(rank, size)
    assert run_guarded(fail, comm) == code and comm.aborted == (code if size > 1 else None)
    told = capsys.readouterr().err
    assert told.startswith(f"hpcfl: rank {rank}: " if size > 1 else "hpcfl: ") and ("Traceback" in told) == isinstance(error, ZeroDivisionError)
    assert str(error) in told


def test_a_stop_is_no_error_and_the_server_alone_tells_of_it(capsys):
    def stop() -> int:
        raise Stopped("stopped on a signal")
    for rank, said in ((0, "hpcfl: stopped on a signal\n"), (1, "")):
        comm = Rank(rank, 2)
        assert run_guarded(stop, comm) == 75 and comm.aborted is None and capsys.readouterr().out == said
    assert run_guarded(lambda: 3, Rank(0, 1)) == 3
