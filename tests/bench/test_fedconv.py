"""The benchmark of FedConv's server: which figures it gives, what these leave out, and what two ranks do."""
import json
import time
from argparse import Namespace

import pytest

from hpcfl.bench import fedconv
from hpcfl.bench.benches import render
from hpcfl.bench.fedconv import Timed, average_steps
from hpcfl.wire.communicator import Communicator
from hpcfl.wire.ranks import Alone
from tests.support.tiny_runs import started, undisturbed

STEPS = ("plain_step_ms", "engine_step_ms", "compression_step_ms", "dilation_step_ms", "aggregation_step_ms")

DELAY_S = 0.1


def carried_out(**changes) -> dict:
    with undisturbed():
        return fedconv.fedconv(Communicator(Alone()), Namespace(**{"device": "cpu", "threads": 1, "steps": 2, "rounds": 1, **changes}))


def test_every_step_and_the_whole_round_are_timed_and_fit_a_terminal():
    figures = carried_out(rounds=2)
    assert all(figures[name] > 0 for name in STEPS) and figures["server_phase_s"] > 0
    assert figures["idle_s"] == [0] and figures["repetitions"] == 2 and figures["steps_per_epoch"] == 2
    assert [line.split()[0] for line in render(figures).splitlines()] == list(figures)


def test_validation_counts_in_the_round_and_in_no_step(monkeypatch):
    validate, calls = Timed.validate, []

    def slow(*arguments):
        calls.append(time.sleep(DELAY_S))
        return validate(*arguments)
    monkeypatch.setattr(Timed, "validate", slow)
    figures = carried_out()
    assert len(calls) == 2 * (2 + 8 + 1), "after each of two epochs of two sizes, eight clients and the average"
    assert figures["server_phase_s"] > DELAY_S * len(calls) and max(figures[name] for name in STEPS) < 1000 * DELAY_S / 2


def test_all_sizes_have_their_part_in_a_figure(monkeypatch):
    booked = []
    monkeypatch.setattr(fedconv, "average_steps", lambda laps, work: booked.extend(laps) or average_steps(laps, work))
    carried_out()
    counts = {key: len(seconds) for laps in booked[:2] for key, seconds in laps.items()}
    sizes = ("fedconv@0.75", "fedconv@0.5625")
    assert counts == {("server", "fedconv"): 1, ("aggregation", "fedconv"): 2, ("fine-tuning", "fedconv"): 1,
                      **{(work, size): epochs for size in sizes for work, epochs in {"compression": 2, "fine-tuning": 1, "dilation": 2}.items()}}


def test_a_figure_is_the_mean_over_sizes_of_the_median_over_repetitions_on_any_rank():
    laps = [{("dilation", "a"): [1.0, 9.0], ("dilation", "b"): [4.0], ("server", "a"): [50.0]}, {("dilation", "a"): [2.0]}]
    assert average_steps(laps, "dilation") == pytest.approx((2 + 4) / 2)


def test_two_ranks_share_the_round_and_one_of_them_reports(tmp_path):
    with started(tmp_path, "bench", "fedconv", "--steps", "2", "--rounds", "1", "--threads", "1", "--json", ranks=2) as process:
        assert process.ends() == 0, process.text()
        figures = json.loads(process.text())
    assert figures["ranks"] == 2 and len(figures["idle_s"]) == 2
    assert 0 < figures["idle_s"][1] < figures["server_phase_s"], "rank 1 waits while the server averages"
