"""A signal that comes too shortly before the time limit is told with the number to set."""
import logging

import pytest

from hpcfl.errors import EnvironmentFault
from hpcfl.runs.signal_lead import VARIABLE, Lead
from tests.support.tiny_runs import carry_out, tiny


@pytest.fixture
def told(monkeypatch):
    """What is logged, by nobody else's handlers."""
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr("hpcfl.runs.signal_lead.log.handlers", [handler])
    return said


def test_a_lead_that_is_too_short_is_told_with_the_number_to_set(told):
    lead = Lead({VARIABLE: "60"})
    for round_s, checkpoint_s in ((30.0, 0.0), (36.0, 2.0), (35.0, 4.0), (41.0, 2.0), (52.0, 1.0)):
        lead.watch(round_s, checkpoint_s)
    assert len(told) == 2, "36 + 4 s need 60 and 41 + 4 s need 70: told; 52 + 4 s need 90: told again"
    assert "the signal comes 60 s before the time limit, which is too short: a round takes up to 41.0 s here and a checkpoint 4.0 s" in told[0]
    assert "--signal=B:USR1@70 in the job script (hpcfl slurm --lead 70)" in told[0] and "--lead 90" in told[1]


def test_without_an_announced_lead_nothing_is_told(told):
    Lead({}).watch(1e9, 1e9)
    assert not told


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_lead_that_is_no_number_is_refused(text):
    with pytest.raises(EnvironmentFault, match=f"{VARIABLE} = '{text}': wanted the seconds"):
        Lead({VARIABLE: text})


def test_a_run_measures_its_rounds_against_the_lead(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0.001")
    told = (carry_out(tiny("standalone"), tmp_path / "run") / "log" / "rank-0000.log").read_text()
    assert told.count("WARNING the signal comes 0.001 s before the time limit") == 1 and "hpcfl slurm --lead 10" in told
