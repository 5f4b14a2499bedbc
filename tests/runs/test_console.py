"""The console says how a run goes, on a terminal, in a log and where it takes long, and ends no run where nobody takes what it says."""
import io
import sys
import threading
import time
from pathlib import Path

import pytest

from hpcfl.runs.console import Console
from tests.support.tiny_runs import carry_out, outcome, tiny


class Broken(io.StringIO):
    """An output of somebody else's that fails."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def read_log(folder: Path) -> str:
    return (folder / "log" / "rank-0000.log").read_text()


def test_a_run_survives_an_output_of_its_callers_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    carry_out(tiny("standalone"), tmp_path / "run")
    assert read_log(tmp_path / "run").count("standard output takes nothing any more ([Errno 5] Input/output error)") == 1


def test_a_log_on_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "run" / "log").mkdir(parents=True)
    (tmp_path / "run" / "log" / "rank-0000.log").symlink_to("/dev/full")
    carry_out(tiny("standalone"), tmp_path / "run")
    error = capsys.readouterr().err
    assert error.count("takes no more: [Errno 28] No space left on device; the run goes on") == 1 and "Traceback" not in error
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"


def test_where_no_log_can_be_kept_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log").write_text("in the way")
    carry_out(tiny("standalone"), tmp_path / "run")
    assert f"{tmp_path / 'run' / 'log'}: no log can be kept there: File exists; the run goes on" in capsys.readouterr().err


@pytest.mark.parametrize(("launcher", "live"), [({}, True), ({"OMPI_COMM_WORLD_SIZE": "1"}, False)])
def test_only_a_terminal_of_its_own_has_a_bar_that_redraws_itself(launcher, live, tmp_path, monkeypatch):
    """mpirun gives its ranks terminals, wherever its own output goes."""
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | launcher).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    carry_out(tiny("standalone"), tmp_path / "run")
    assert ("\x1b" in terminal.getvalue()) == live


def test_a_long_round_is_heard_of_and_a_new_one_is_short_again(capsys):
    rounds = iter([0.1, 0.3, 0.5, 0.6, 0.9, 1.3, 0.2, 0.3, 0.5, *[0.5] * 1000])

    def told() -> tuple[float, str]:
        seconds = next(rounds)
        return seconds, f"at {seconds}"
    with Console(speaks=True, live=False).beating(0.4, told):
        time.sleep(2.0)
    assert capsys.readouterr().out.split("\n") == ["at 0.5", "at 0.9", "at 1.3", "at 0.5", ""]
    with Console(speaks=False, live=False).beating(0.4, told), Console(speaks=True, live=False).beating(0.0, told):
        assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_a_round_says_first_what_the_federations_own_models_are_worth(tmp_path, capsys):
    metrics = outcome(carry_out(tiny("heterofl", evaluation={"every": 1}, federation={"rounds": 1}), tmp_path / "sliced")).metrics
    _, legend, line, _ = capsys.readouterr().out.splitlines()
    images = metrics["evaluation/generalization_count"].sum()
    worth = 100 * metrics["evaluation/global_correct"][-1, 0].sum() / images
    clients = 100 * metrics["evaluation/generalization_correct"][-1].sum(1) / images
    assert f"  global {worth:5.1f}  clients {clients.mean():5.1f} [{clients.min():5.1f} ..{clients.max():5.1f}]  own " in line
    assert f"on the {images} test images. global: the federation's own models; clients: the models that clients hold" in legend
    carry_out(tiny("standalone", evaluation={"every": 1, "personal": False}, federation={"rounds": 1}), tmp_path / "alone")
    _, legend, line, _ = capsys.readouterr().out.splitlines()
    assert "global" not in legend + line and "  own " not in line and " clients " in line
