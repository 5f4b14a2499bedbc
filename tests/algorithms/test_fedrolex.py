"""FedRolex: the window of channels moves on by one each round and comes to all of them. What it shares with HeteroFL is in test_submodel."""
import torch

from hpcfl.algorithms.fedrolex import FedRolex
from tests.support.in_memory import job, run, step, world

MODELS = {"names": ["cnn2_bn"], "sizes": [0, 1, 2], "feature_size": 0}


def test_the_window_of_a_round_begins_at_its_number_and_wraps_around():
    method = step(world(job("fedrolex", models=MODELS)), FedRolex)
    for round_ in (0, 1, 5, 16, 21):
        window = sorted((round_ + index) % 16 for index in range(9))                         # 0.5625 of 16 channels
        assert method.kept("cnn2_bn@0.5625", round_)["body.conv1.weight"][0].tolist() == window


def test_every_channel_is_kept_equally_often_in_a_turn_of_the_window():
    method = step(world(job("fedrolex", models=MODELS)), FedRolex)
    counts = torch.zeros(16)
    for round_ in range(16):
        counts[method.kept("cnn2_bn@0.5625", round_)["body.conv1.weight"][0]] += 1
    assert counts.tolist() == [9.0] * 16


def test_the_server_counts_the_rounds_that_move_the_window():
    found = run(world(job("fedrolex", models=MODELS, federation={"clients": 2, "rounds": 3})))
    assert [int(state.server["round"]) for state in found.states] == [0, 1, 2, 3]
