"""Meter: means of what losses measured, and errors that name the clients whose training, or whose beginning, is at fault."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpcfl import tree
from hpcfl.errors import NonFiniteError
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.meter import Meter
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn
from tests.support.small_nets import ENGINES, SGD, Net, batches, cross_entropy, net_group, states


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_names_the_clients_and_the_place(engine):
    def poisoned(client):
        for batch in batches([10, 10, 10])(client):
            yield batch | {"x": batch["x"] * math.nan} if client == 1 else batch
    with pytest.raises(NonFiniteError, match=r"round 7.*client 1 "):
        fit(net_group(3), {"model": Net()}, [Turn(("model",), cross_entropy, SGD)], poisoned, engine=engine, where="round 7")


@pytest.mark.parametrize("engine", ENGINES)
def test_infinite_weights_after_the_last_loss_are_found(engine):
    group = Group.from_states("line", states(lambda: nn.Linear(1, 1), "model", 2))

    def loss(modules, batch, context):
        return (modules.model(batch["x"]) * batch["x"]).sum()
    with pytest.raises(NonFiniteError, match="client 0 "):
        fit(group, {"model": nn.Linear(1, 1)}, [Turn(("model",), loss, Optimizer("sgd", 1.0))],
            lambda client: [{"x": torch.full((1, 1), 1e18 if client else 3e19)}], engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_nobody_can_compute_with_are_refused_and_the_setting_at_work_is_named(engine):
    rule = Optimizer("sgd", 1e30, rate_setting="algorithm.server_lr = 1e+30")
    with pytest.raises(NonFiniteError, match=r"round 7: training of client 0(, 1)? left weights of up to \S+e\+\d+, with which nobody can compute: "
                                             r"their squares are infinite; lower the learning rate \(algorithm.server_lr = 1e\+30\)$"):
        fit(net_group(2), {"model": Net()}, [Turn(("model",), cross_entropy, rule)], batches([5, 5]), engine=engine, where="round 7")


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_client_began_with_is_blamed_where_it_is_at_fault(engine):
    group = net_group(2)
    state = tree.clone(group.state)
    state["model/head.weight"][1, 0, 0] = math.nan
    begun, sane = replace(group, state=state), [Turn(("model",), cross_entropy, SGD)]
    told = (r"training of client 1 reached NaN or infinity in its loss or weights; but 'model/head.weight' of client 1 held it before its first step: "
            r"what it received, or its data or loss, is at fault, not its training; lower algorithm.server_lr$")
    with pytest.raises(NonFiniteError, match=told):
        fit(begun, {"model": Net()}, sane, batches([5, 5]), engine=engine, origin="lower algorithm.server_lr")
    state["model/head.weight"][1] = torch.linspace(-1e18, 1e18, 3)[:, None]
    with pytest.raises(NonFiniteError, match=r"but the loss of client 1 was \d\S*e\+1\d before its first step"):
        fit(begun, {"model": Net()}, [Turn(("model",), cross_entropy, Optimizer("sgd", 1e3))], batches([5, 50]), engine=engine)


def test_means_are_those_of_each_client_over_the_steps_that_it_took():
    meter = Meter((4, 5))
    meter.add({"loss": torch.tensor([1.0, 2.0])}, (0, 1))
    meter.add({"loss": torch.tensor([5.0]), "share": torch.tensor([0.5])}, (1,), torch.tensor([1]))
    setup = SimpleNamespace(trained=(("w",),))
    assert meter.read({"w": torch.ones(2, 3)}, setup, lambda: {}) == [{"loss": 1.0}, {"loss": 3.5, "share": 0.5}]
    assert meter.first.tolist() == [1.0, 2.0], "the loss before a client's first step"
