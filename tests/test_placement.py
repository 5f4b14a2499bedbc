"""Placement: balanced, complete, and the same for whoever computes it."""
from itertools import product

import numpy as np
import pytest

from hpcfl.placement import place


def loads(costs, home, ranks):
    return np.bincount(home, weights=costs, minlength=ranks)


def test_the_largest_goes_first_and_each_to_the_least_loaded_rank():
    assert place([3.0, 8.0, 5.0, 4.0], 2) == (0, 0, 1, 1)          # 8 | ., 8 | 5, 8 | 5 4, 8 3 | 5 4


def test_equal_costs_are_dealt_in_turn():
    assert place([1.0] * 5, 2) == (0, 1, 0, 1, 0)


def test_one_rank_hosts_everybody():
    assert place([1.0, 2.0, 3.0], 1) == (0, 0, 0)
    assert place([1.0, 2.0, 3.0], 1, "dedicated") == (0, 0, 0)


def test_a_dedicated_server_hosts_nobody():
    assert set(place([1.0] * 6, 3, "dedicated")) == {1, 2}


def test_more_ranks_than_clients_leave_ranks_idle():
    assert place([2.0, 1.0], 4) == (0, 1)


def test_free_clients_still_have_a_place():
    assert place([0.0, 0.0, 5.0], 2) == (1, 1, 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_busiest_rank_is_within_a_third_of_the_best_placement(seed):
    costs = np.random.default_rng(seed).lognormal(0, 1, 7)
    best = min(loads(costs, home, 3).max() for home in product(range(3), repeat=7))
    assert best <= loads(costs, place(list(costs), 3), 3).max() <= (4 / 3 - 1 / 9) * best + 1e-12         # Graham 1969


def test_it_is_a_pure_function():
    costs = list(np.random.default_rng(0).random(50))
    assert place(costs, 7) == place(list(costs), 7) and set(place(costs, 7)) == set(range(7))
