"""Placement: balanced, complete, and the same for whoever computes it; after a restart by what was measured, where no bit depends on it."""
from dataclasses import replace
from itertools import product

import h5py
import numpy as np
import pytest
import torch

from hpcfl.federation.placement import Past, fill_in_seconds, place_clients, resettle
from hpcfl.federation.world import World
from hpcfl.runs import checkpoint
from hpcfl.wire.communicator import Alone, Communicator
from tests.support.tiny_runs import apart, carry_out, checkpoint_of, deterministic, outcome, tiny

NAN = float("nan")
PAST = Past(home=(0, 1, 1, 1), ranks=2, server="shared", seconds=(1.0, 8.0, 2.0, 6.0))
EXPECTED = [4.0, 3.0, 2.0, 1.0]


def loads(costs, home, ranks):
    return np.bincount(home, weights=costs, minlength=ranks)


def test_the_largest_goes_first_and_each_to_the_least_loaded_rank():
    assert place_clients([3.0, 8.0, 5.0, 4.0], 2) == (0, 0, 1, 1)          # 8 | ., 8 | 5, 8 | 5 4, 8 3 | 5 4


def test_equal_costs_are_dealt_in_turn():
    assert place_clients([1.0] * 5, 2) == (0, 1, 0, 1, 0)


def test_one_rank_hosts_everybody():
    assert place_clients([1.0, 2.0, 3.0], 1) == (0, 0, 0)
    assert place_clients([1.0, 2.0, 3.0], 1, "dedicated") == (0, 0, 0)


def test_a_dedicated_server_hosts_nobody():
    assert set(place_clients([1.0] * 6, 3, "dedicated")) == {1, 2}


def test_more_ranks_than_clients_leave_ranks_idle():
    assert place_clients([2.0, 1.0], 4) == (0, 1)


def test_free_clients_still_have_a_place():
    assert place_clients([0.0, 0.0, 5.0], 2) == (1, 1, 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_busiest_rank_is_within_a_third_of_the_best_placement(seed):
    costs = np.random.default_rng(seed).lognormal(0, 1, 7)
    best = min(loads(costs, home, 3).max() for home in product(range(3), repeat=7))
    assert best <= loads(costs, place_clients(list(costs), 3), 3).max() <= (4 / 3 - 1 / 9) * best + 1e-12         # Graham 1969


def test_it_is_a_pure_function():
    costs = list(np.random.default_rng(0).random(50))
    assert place_clients(costs, 7) == place_clients(list(costs), 7) and set(place_clients(costs, 7)) == set(range(7))


def test_as_many_ranks_keep_every_client_where_it_was():
    assert resettle(PAST, EXPECTED, 2, "shared", deterministic=False) == PAST.home


def test_measured_seconds_decide_where_no_bit_depends_on_the_placement():
    wanted = place_clients(PAST.seconds, 2)
    assert wanted == (0, 0, 1, 1) and resettle(PAST, EXPECTED, 2, "shared", deterministic=True) == wanted
    assert resettle(PAST, EXPECTED, 3, "shared", deterministic=False) == place_clients(PAST.seconds, 3) != place_clients(EXPECTED, 3)
    assert resettle(PAST, EXPECTED, 2, "dedicated", deterministic=False) == (1, 1, 1, 1)


def test_a_client_without_seconds_is_expected_to_be_as_fast_as_the_others():
    assert fill_in_seconds([1.0, 2.0, 3.0], [10.0, NAN, 50.0]) == [10.0, 30.0, 50.0]
    assert fill_in_seconds([1.0, 2.0], [NAN, NAN]) == [1.0, 2.0]
    assert resettle(replace(PAST, seconds=(NAN,) * 4), EXPECTED, 3, "shared", deterministic=True) == place_clients(EXPECTED, 3)


@pytest.fixture
def stopped(tmp_path):
    """A deterministic run with its checkpoints, in whose record client 0 took by far the longest in the second of its rounds and later."""
    job = deterministic(tiny("fedprox", federation={"participation": 1.0}, checkpoint={"every": 1, "keep": 9}))
    folder = carry_out(job, tmp_path / "run")
    with h5py.File(folder / "metrics.h5", "r+") as file:
        file["train/seconds"][:] = [[900.0, 1.0, 2.0, 3.0, 4.0], [100.0, 1.0, 2.0, 3.0, 4.0], [7.0] * 5]
        file["train/refine_seconds"][:] = [[0.0, 0.0, 0.0, 0.0, 4.0]] * 3
    return job, folder


def test_a_checkpoint_knows_where_clients_were_and_what_a_round_took_them(stopped):
    _, folder = stopped
    assert checkpoint.read_past(checkpoint_of(folder, 2)) == Past((0,) * 5, 1, "shared", (500.0, 1.0, 2.0, 3.0, 8.0))
    assert checkpoint.read_past(folder).seconds == (100.0, 1.0, 2.0, 3.0, 8.0)
    assert checkpoint.read_past(folder / "nothing here") is None


def test_only_rounds_of_the_phase_of_the_checkpoint_count(stopped):
    _, folder = stopped
    with h5py.File(folder / "metrics.h5", "r+") as file:
        file["rounds/phase"][0] = "before"
        file["train/seconds"][1, 3] = file["train/refine_seconds"][1, 3] = NAN
    assert str(checkpoint.read_past(checkpoint_of(folder, 2)).seconds) == str((100.0, 1.0, 2.0, NAN, 8.0))


def test_a_slow_client_has_a_rank_of_its_own_after_a_restart_and_the_results_are_the_same(stopped, tmp_path):
    job, folder = stopped
    seen = []
    for rank in (0, 1):
        comm = Communicator(Alone())
        comm.rank, comm.size = rank, 2
        seen.append(World(job, comm, torch.device("cpu"), checkpoint.read_past(checkpoint_of(folder, 1))).mine)
    assert seen == [(0,), (1, 2, 3, 4)]
    resumed = carry_out(job, tmp_path / "resumed", resume=checkpoint_of(folder, 1))
    assert [line for line in apart(outcome(resumed), outcome(folder)) if "seconds" not in line] == []


def test_a_record_that_cannot_be_read_says_nothing_of_seconds_and_clients_stay_where_they_were(stopped):
    _, folder = stopped
    (folder / "metrics.h5").write_bytes(b"")
    assert str(checkpoint.read_past(folder)) == str(Past((0,) * 5, 1, "shared", (NAN,) * 5))
