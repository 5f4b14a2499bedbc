"""Ledger: seconds of the innermost block, bytes and metrics by client, and an account that begins anew with each round."""
import pickle
import time

import pytest
import torch

from hpcfl.federation.ledger import SECONDS, Ledger

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds as the ledger reads them, set by the test: clock[0]."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_seconds_of_a_block_inside_another_belong_to_the_inner_one_alone(clock):
    ledger = Ledger(CPU)
    with ledger("train"):
        clock[0] += 1
        with ledger("combine"):
            clock[0] += 4
        clock[0] += 2
    clock[0] += 8
    account = ledger.close()
    assert {kind: seconds for kind, seconds in account["seconds"].items() if seconds} == {"train": 3.0, "combine": 4.0}
    assert tuple(account["seconds"]) == SECONDS and account["wall_s"] == 15.0
    intervals = account["intervals"]
    assert [SECONDS[kind] for kind in intervals["kind"]] == ["train", "combine", "train"]
    assert intervals["start_s"].tolist() == [0.0, 1.0, 5.0] and intervals["duration_s"].tolist() == [1.0, 4.0, 2.0]


def test_a_block_that_fails_is_booked_and_closed(clock):
    ledger = Ledger(CPU)
    with pytest.raises(ValueError), ledger("train"):
        clock[0] += 2
        raise ValueError
    clock[0] += 1
    assert ledger.close()["seconds"]["train"] == 2.0


def test_an_interval_too_short_to_be_seen_counts_as_seconds_alone(clock):
    ledger = Ledger(CPU)
    with ledger("idle"):
        clock[0] += 1e-6
    account = ledger.close()
    assert account["seconds"]["idle"] == pytest.approx(1e-6) and account["intervals"]["kind"].size == 0


def test_what_is_asked_for_in_the_middle_holds_the_open_block_too(clock):
    ledger = Ledger(CPU)
    clock[0] += 1
    with ledger("aggregate"):
        clock[0] += 2
        wall, seconds = ledger.so_far()
        assert (wall, seconds["aggregate"]) == (3.0, 2.0)
        clock[0] += 4
    assert ledger.close()["seconds"]["aggregate"] == 6.0


def test_rounds_begin_where_they_are_opened_and_are_counted_from_the_first(clock):
    ledger, opened = Ledger(CPU), []
    for wait in (0.0, 5.0, 7.0):
        clock[0] += wait
        ledger.open()
        clock[0] += 1
        account = ledger.close()
        assert account["wall_s"] == 1.0
        opened.append(account["opened_s"])
    assert opened == [0.0, 6.0, 14.0]


def test_bytes_and_metrics_are_booked_by_client_and_gone_with_the_account():
    ledger = Ledger(CPU)
    ledger.book_download(1, 10)
    ledger.book_download(1, 5)
    ledger.book_uploads({1: 3, 2: 4})
    ledger.book_uploads({2: 4})
    ledger.book_metrics("train", (1, 2), {"loss": torch.tensor([0.5, 1.5])})
    ledger.book_metrics("refine", (2,), {"loss": torch.tensor([9.0])})
    ledger.note("temperature", torch.tensor(2))
    account = pickle.loads(pickle.dumps(ledger.close()))
    assert (account["down"], account["up"]) == ({1: 15}, {1: 3, 2: 8})
    assert account["metrics"] == {"loss": {1: 0.5, 2: 1.5}, "refine_loss": {2: 9.0}} and account["notes"] == {"temperature": 2.0}
    empty = ledger.close()
    assert not (empty["down"] or empty["up"] or empty["metrics"] or empty["notes"])


def test_spread_work_is_booked_by_the_mean_item_of_each_piece():
    ledger = Ledger(CPU)
    ledger.book_help(4, 2.0)
    ledger.book_help(2, 3.0)
    ledger.book_help(0, 0.25)                                      # nothing to do took its time too
    assert ledger.close()["item_s"] == 0.5 + 1.5 + 0.25


def test_costs_of_all_steps_of_a_round_add_up_and_measurements_do_not():
    ledger = Ledger(CPU)
    for value in (1.0, 10.0):
        ledger.book_costs("refine", (0, 2), {"seconds": torch.tensor([value, 2 * value])})
        ledger.book_metrics("refine", (0, 2), {"loss": torch.tensor([value, 2 * value])})
    assert ledger.close()["metrics"] == {"refine_seconds": {0: 11.0, 2: 22.0}, "refine_loss": {0: 10.0, 2: 20.0}}
