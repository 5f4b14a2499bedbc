"""The estimate of a round: what a rank has to do, how long a batch takes, and what travels in a round of each kind."""
import itertools
from types import SimpleNamespace

import pytest
import torch

from hpcfl.doctor import estimate
from hpcfl.federation.world import World
from hpcfl.wire.communicator import Alone, Communicator
from hpcfl.wire.hockney import SMALL_CALLS
from tests.support.tiny_runs import tiny

WIRE = [{"collective": "Bcast", "rank_bytes": size, "median_s": seconds} for size, seconds in ((8, 1.0), (108, 2.0), (1000, 4.0))]


def world(**changes) -> World:
    return World(tiny("fedavg", **changes), Communicator(Alone()), torch.device("cpu"))


def test_the_load_of_a_rank_is_its_clients_their_batches_and_the_time_of_each():
    here = world(federation={"clients": 5, "rounds": 3}, training={"batch": 8, "epochs": 2})
    load, parts = estimate.measure_load(here), [here.split.train[client] for client in range(5)]
    assert load.clients == {"mlp2": 3, "cnn1": 2}
    for architecture, clients in (("mlp2", (0, 2, 4)), ("cnn1", (1, 3))):
        group = next(group for group in here.join() if group.clients == clients)
        steps = sum(len(list(here.client_site(group, here.plan[0], 0).epochs(client, 2, 8))) for client in clients)
        assert load.batches[architecture] == steps and 0 < load.batch_s[architecture] < 5
    assert load.train_s == pytest.approx(sum(load.batches[name] * load.batch_s[name] for name in load.batches))
    assert load.needed_bytes > sum(map(len, parts)) * 64, "images of 1x8x8, and more"


def test_a_load_says_how_long_its_batches_took_for_want_of_a_core(monkeypatch):
    told = iter([(2.0, 1.0), (3.0, 20.0)])
    monkeypatch.setattr(estimate, "read_core_seconds", lambda: next(told))
    assert estimate.measure_load(world()).crowding == 20                # 1 s of work, and 19 of waiting
    monkeypatch.setattr(estimate, "read_core_seconds", lambda: (0.0, 0.0))
    assert estimate.measure_load(world()).crowding == 1                 # a system that does not tell


def test_clients_that_train_beside_each_other_share_the_time_of_a_batch(monkeypatch):
    here, seconds = world(training={"engine": "vmap"}), itertools.count()
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))     # each step takes a second, whoever takes it
    assert [estimate.time_batch(here, "mlp2", 4, clients) for clients in (1, 16)] == [1, 1 / 16]


def test_a_round_costs_most_where_a_rank_has_most_to_do_and_nothing_where_nothing_travels():
    loads = tuple(estimate.Load({"cnn1": count}, {"cnn1": 10 * count}, {"cnn1": 0.1}, 0) for count in (1, 3))
    found = estimate.estimate_round(world(federation={"participation": 0.5}), loads, WIRE)
    assert found.train_s == pytest.approx(0.5 * 3) and found.up_by == "Reduce" and found.small_s == SMALL_CALLS and 0 < found.wire_share < 1
    alone = estimate.estimate_round(World(tiny("standalone"), Communicator(Alone()), torch.device("cpu")), loads, WIRE)
    assert (alone.down_bytes, alone.up_bytes, alone.down_s, alone.up_s) == (0, 0, 0, 0)
    gathering = estimate.estimate_round(world(run={"deterministic": True}, federation={"participation": 1.0}), loads, WIRE)
    assert gathering.up_by == "Gatherv" and gathering.up_bytes == 3 * estimate.count_model_bytes(world(), "cnn1")
