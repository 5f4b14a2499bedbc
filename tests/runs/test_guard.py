"""Whatever a rank raises becomes the exit code of its kind, and where there are several ranks the end of all."""
import pytest

from hpcfl.errors import DataError, Interrupted, Stopped
from hpcfl.runs import guard
from hpcfl.runs.guard import run_guarded


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
