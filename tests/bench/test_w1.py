"""The benchmark of the whole loop: what it counts, and that a deterministic run is asked for where it is wanted."""
from argparse import Namespace

import pytest

from hpcfl.bench.w1 import w1
from hpcfl.wire.communicator import Communicator
from hpcfl.wire.ranks import Alone
from tests.support.tiny_runs import undisturbed


def test_one_round_is_timed_after_a_first_one():
    with undisturbed():
        figures = w1(Communicator(Alone()), Namespace(threads=1, device="cpu", deterministic=False, rounds=1))
    assert list(figures) == ["ranks", "threads", "device", "startup_s", "first_round_s", "round_s"]
    assert (figures["ranks"], figures["threads"], figures["device"]) == (1, 1, "cpu") and min(figures["first_round_s"], figures["round_s"]) > 0


def test_a_deterministic_benchmark_connects_its_ranks_anew(monkeypatch):
    def connect(deterministic: bool) -> Communicator:
        raise LookupError(f"deterministic: {deterministic}")
    monkeypatch.setattr("hpcfl.bench.w1.connect", connect)
    with pytest.raises(LookupError, match="deterministic: True"):
        w1(Communicator(Alone()), Namespace(threads=1, device="cpu", deterministic=True, rounds=1))
