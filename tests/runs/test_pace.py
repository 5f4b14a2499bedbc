"""Checkpoints by the clock: at the latest after so many seconds, earlier where they cost next to nothing, and wherever a round ends."""
import pytest

from hpcfl.runs import pace
from hpcfl.runs.pace import CHEAP, Pace
from tests.support.tiny_runs import carry_out, outcome, tiny


class Clock:
    """A monotonic clock that a test moves."""

    now_s = 100.0

    def monotonic(self) -> float:
        self.now_s += 0.001
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def save(pace: Pace, clock: Clock, took_s: float) -> None:
    with pace.saving():
        clock.now_s += took_s


@pytest.mark.parametrize(("took_s", "due_after_s"), [(0.1, CHEAP * 0.1), (1.0, CHEAP * 1.0), (100.0, 60.0)])
def test_a_checkpoint_is_due_after_its_seconds_and_earlier_where_the_last_was_cheap(took_s, due_after_s, clock):
    pace = Pace(60.0)
    assert pace.due, "what the first costs is unknown, and a disk that takes none is to show early"
    save(pace, clock, took_s)
    clock.now_s += 0.9 * due_after_s
    assert not pace.due
    clock.now_s += 0.2 * due_after_s
    assert pace.due


def test_without_a_limit_no_checkpoint_is_ever_due(clock):
    pace = Pace(0.0)
    clock.now_s += 1e9
    assert not pace.due


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-9, [1, 2, 3]), (60.0, [1, 3]), (0.0, [3])])
def test_a_run_writes_checkpoints_by_the_clock_beside_those_by_rounds(seconds, rounds, clock, tmp_path):
    """A reading of the clock takes a millisecond and nothing else does."""
    folder = carry_out(tiny("standalone", checkpoint={"seconds": seconds, "keep": 9}), tmp_path / "run")
    assert [int(path.name[6:]) for path in sorted((folder / "checkpoints").iterdir())] == rounds and outcome(folder).manifest["rows"] == 3
