"""hpcfl starts mpirun itself where no signal of the terminal reaches it, and its exit code is mpirun's."""
import os
import signal
import threading
import time

import pytest

from hpcfl.errors import EnvironmentFault, Interrupted, JobError
from hpcfl.runs import starter
from tests.support.tiny_runs import undisturbed

LAUNCHER = """#!/bin/bash
printf '%s ' "${@:5}" >words
trap 'touch told; exit 75' USR1
trap 'touch ended; exit 1' TERM
touch listening
[[ -e at-once ]] && exit "$(<at-once)"
[[ -e dies ]] && kill -9 $$
for _ in {1..1000}; do sleep 0.02; done
"""


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """A folder, where this process works, with an mpirun that writes down what it is told."""
    (tmp_path / "mpirun").write_text(LAUNCHER)
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    with undisturbed():
        yield tmp_path


def send_when_it_listens(folder, *numbers: int) -> None:
    """Send this process signals, one after another, as soon as the launcher runs."""
    def send() -> None:
        while not (folder / "listening").exists():
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)
    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("code", [0, 5, 75])
def test_the_exit_code_is_that_of_mpirun_and_the_words_are_those_of_the_command(code, launcher):
    (launcher / "at-once").write_text(str(code))
    assert starter.start(3, ["run", "job.toml"]) == code
    assert (launcher / "words").read_text() == "hpcfl run job.toml --ranks 0 "


def test_a_launcher_that_a_signal_ended_gives_the_code_of_a_shell(launcher):
    (launcher / "dies").touch()
    assert starter.start(2, []) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_asks_for_a_stop_reaches_the_ranks_as_sigusr1(number, launcher):
    send_when_it_listens(launcher, number)
    assert starter.start(2, []) == 75 and (launcher / "told").exists()


def test_a_second_ctrl_c_ends_the_launcher_at_once(launcher):
    (launcher / "mpirun").write_text(LAUNCHER.replace("trap 'touch told; exit 75' USR1", "trap '' USR1"))
    send_when_it_listens(launcher, signal.SIGINT, signal.SIGINT)
    with pytest.raises(Interrupted, match="the same command goes on from the last checkpoint"):
        starter.start(2, [])
    assert (launcher / "ended").exists()


def test_a_number_of_ranks_that_cannot_be_and_a_missing_mpirun_are_told(tmp_path, monkeypatch):
    with pytest.raises(JobError, match="--ranks 0: wanted a whole number of at least 1"):
        starter.start(0, [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="--ranks 2: there is no mpirun in PATH"):
        starter.start(2, [])
