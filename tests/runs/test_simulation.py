"""A simulation records what each phase does last, and evaluates the federation's models when a round is over."""
import numpy as np
import pytest
import torch

from hpcfl.algorithms import PLANS
from hpcfl.federation.world import World
from hpcfl.report.measures import REFINING
from hpcfl.runs import simulation
from hpcfl.wire.communicator import Alone, Communicator
from tests.support.tiny_runs import carry_out, outcome, tiny


def test_models_of_the_federation_are_evaluated_on_the_whole_test_set_at_the_end_of_a_round(tmp_path):
    job = tiny("fedavg", federation={"participation": 1.0}, evaluation={"every": 1, "batch": 50})
    metrics = outcome(carry_out(job, tmp_path / "run")).metrics
    end = metrics["evaluation/stage"] == b"end"
    assert metrics["evaluation/global_names"].tolist() == [b"cnn1", b"mlp2"]
    assert end.sum() == 3 and (metrics["evaluation/global_correct"][~end] == -1).all()
    for index, name in enumerate(metrics["evaluation/global_names"]):
        (holders,) = np.nonzero(metrics["clients/architecture"] == name)
        for client in holders:                                     # who has just adopted the average answers as it does
            assert metrics["evaluation/global_correct"][end, index].tolist() == metrics["evaluation/generalization_correct"][end, client].tolist()


@pytest.mark.parametrize("case", ["fedavg", "fedvtc", "ccvr", "gaussian", "fedproto", "fml", "gefl_f", "heterofl", "fedgh"])
def test_the_record_says_what_each_phase_does_last_and_with_how_many_clients_it_averages(case):
    job = tiny(case)
    plan = simulation._describe_plan(World(job, Communicator(Alone()), torch.device("cpu")))
    found = {each["phase"]: (each["refines"], each["averages"]) for each in plan}
    assert found == {"fedavg": {"rounds": ("adopt", {"cnn1": 2, "mlp2": 3})}, "fedproto": {"rounds": (None, {})}, "fml": {"rounds": (None, {"meme": 5})},
                     "fedvtc": {"rounds": (None, {}), "finetune": ("finetune", {})}, "fedgh": {"rounds": ("adopt", {})},
                     "ccvr": {"rounds": ("adopt", {"cnn1": 2, "common": 5, "mlp2": 3}), "calibrate": ("adopt", {})},
                     "gaussian": {"statistics": (None, {}), "classify": ("adopt", {})}, "heterofl": {"rounds": ("adopt", {"global": 5})},
                     "gefl_f": {"warmup": ("adopt", {"cnn1": 2, "cnn2_bn": 3, "common": 5}), "generator": (None, {}),
                                "targets": ("adopt", {"cnn1": 2, "cnn2_bn": 3, "common": 5})}}[case]


@pytest.mark.parametrize("method", PLANS)
def test_every_method_says_what_its_refining_is(method):
    steps = World(tiny(method), Communicator(Alone()), torch.device("cpu")).steps
    assert {step.refines for step in steps if step.overrides("refine")} <= REFINING.keys() - {"refine"}
