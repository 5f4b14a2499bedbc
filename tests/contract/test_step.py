"""A step: frozen once it is constructed, asked what it overrides, and the plan of a method that is one step."""
from types import SimpleNamespace

import pytest
import torch

from hpcfl.algorithms import PLANS
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.contract import Algorithm, ClientSite, JobError, LayoutError, Phase, Update, plan_rounds
from hpcfl.training.group import Group
from hpcfl.tree import Tree
from tests.support.in_memory import job, of_steps, run, world

TWO = {"federation": {"clients": 2, "rounds": 2}, "models": {"names": ["mlp2"]}}


class Counting(Algorithm):
    """A method of somebody else's, which remembers in itself what a resumed run would not know."""

    def __init__(self, config, problem):
        super().__init__(config, problem)
        self.rounds = 0                                            # while it is constructed a step may be written to

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        self.rounds += 1
        return Update(group)


def test_a_step_that_remembers_in_itself_is_refused_with_verb_attribute_and_the_places_for_it(monkeypatch):
    with pytest.raises(LayoutError) as raised:
        run(of_steps(monkeypatch, Counting, **TWO))
    said = str(raised.value)
    assert said.startswith("Counting.train, clients 0-1: 'rounds' of Counting is set after its construction"), said
    assert all(place in said for place in ("server's or the group's state", "site.once", "site.once_for_all"))


@pytest.mark.parametrize("name", PLANS)
def test_every_step_is_frozen_whatever_its_class_sets_at_its_construction(name):
    for step in world(job(name)).steps:
        for attribute in ("config", "problem", "anything"):
            with pytest.raises(LayoutError, match=f"'{attribute}' of {type(step).__name__} is set after its construction"):
                setattr(step, attribute, None)


def test_a_step_overrides_what_its_class_or_a_base_of_it_defines():
    assert FedAvg.overrides("train") and FedAvg.overrides("refine") and not FedAvg.overrides("prepare")
    assert not any(Algorithm.overrides(verb) for verb in ("train", "aggregate", "refine", "draw"))


def test_a_phase_asks_its_first_step_that_trains_and_refines_by_the_first_that_refines():
    found = world(job("fedvtc", {"finetune": "every_round"}))
    (phase,) = found.plan
    assert (phase.asks, phase.refiner) == phase.steps
    assert Phase("none", 1, ()).asks is None and Phase("none", 1, ()).refiner is None


def test_the_plan_of_one_step_is_one_phase_of_all_rounds():
    problem = world(job("standalone", federation={"rounds": 7})).problem
    (phase,) = plan_rounds(FedAvg)("settings", problem)
    assert (phase.name, phase.rounds, phase.everyone) == ("rounds", 7, False)
    (step,) = phase.steps
    assert type(step) is FedAvg and step.config == "settings" and step.problem is problem


def test_a_plan_without_mixed_images_refuses_a_job_that_mixes_them():
    problem = world(job("standalone", training={"augment": ["mixup"]})).problem
    assert plan_rounds(FedAvg)(None, problem)
    with pytest.raises(JobError, match="training.augment = .* mixes images of different classes"):
        plan_rounds(FedAvg, mixed_images=False)(None, problem)


def test_rates_of_a_rule_name_the_setting_they_come_from():
    step = FedAvg(SimpleNamespace(server_lr=0.5), world(job("standalone")).problem)
    assert (step.rule("sgd", "server_lr").lr, step.rule("sgd", "server_lr").rate_setting) == (0.5, "algorithm.server_lr = 0.5")
    assert step.rule("adam", "server_lr", 0.25).rate_setting == "algorithm.server_lr = 0.5, at work 0.25"


def test_a_client_joins_with_a_model_from_its_own_stream_and_keeps_the_one_it_has():
    found = world(job("standalone", **TWO))
    step, empty = found.steps[0], Group("mlp2", (0, 1), {})
    joined = step.join(empty, None)
    with found.problem.stream("init", 1).seeding():
        wanted = found.problem.model("mlp2").state_dict()
    assert all(torch.equal(joined.state[f"model/{path}"][1], leaf) for path, leaf in wanted.items())
    assert step.join(joined, None) is joined
