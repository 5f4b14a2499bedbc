"""Whatever a rank raises becomes the exit code of its kind and one message, and where there are several ranks the end of all, soon."""
import re
import time

import pytest

from hpcfl.contract import ClientSite
from hpcfl.errors import DataError, Interrupted, Stopped
from hpcfl.runs import guard
from hpcfl.runs.guard import run_guarded
from tests.support.faults import RANK
from tests.support.tiny_runs import started, tiny, write_job


class Comm:
    """One of some ranks, noting with which code all of them were ended."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size, self.is_server, self.aborted = rank, size, rank == 0, None

    def abort(self, code: int) -> None:
        self.aborted = code


def raising(error: BaseException):
    """A body that raises."""
    def body() -> int:
        raise error
    return body


def test_the_code_of_the_body_is_that_of_the_process():
    assert run_guarded(lambda: 4, Comm()) == 4


@pytest.mark.parametrize(("error", "code", "text"), [(DataError("client 3: no images"), DataError.exit_code, "hpcfl: client 3: no images\n"),
                                                     (KeyboardInterrupt(), Interrupted.exit_code, "hpcfl: interrupted from the keyboard\n")])
def test_an_error_of_ours_is_told_without_a_traceback(error, code, text, capsys):
    comm = Comm()
    assert run_guarded(raising(error), comm) == code and comm.aborted is None
    assert capsys.readouterr().err == text


def test_any_other_error_comes_with_its_traceback(capsys):
    assert run_guarded(raising(ZeroDivisionError("by purpose")), Comm()) == 1
    assert "Traceback" in (told := capsys.readouterr().err) and "ZeroDivisionError: by purpose" in told


def test_a_stop_is_no_error_and_told_once(capsys):
    codes = [run_guarded(raising(Stopped("run: stopped by SIGUSR1")), Comm(rank, 2)) for rank in (0, 1)]
    assert codes == [Stopped.exit_code] * 2 == [75, 75]
    assert capsys.readouterr() == ("hpcfl: run: stopped by SIGUSR1\n", "")


def test_one_of_several_ranks_takes_the_others_along_and_says_who_it_is(monkeypatch, capsys):
    monkeypatch.setattr(guard.time, "sleep", lambda seconds: None)
    comm = Comm(rank=1, size=2)
    assert run_guarded(raising(DataError("no images")), comm) == comm.aborted == DataError.exit_code
    assert capsys.readouterr().err == "hpcfl: rank 1: no images\n"


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
