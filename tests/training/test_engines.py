"""Engines: equal to a plain torch loop and to each other, whatever the Group, the shards and the optimiser."""
import math

import pytest
import torch
from torch import nn

from hpcfl import tree
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn
from tests.support.small_nets import ADAM, ENGINES, SGD, Net, batches, close, cross_entropy, net_group, plain, states


@pytest.mark.parametrize("optimizer", [Optimizer("sgd", 0.1), SGD, ADAM, Optimizer("sgd", 0.1, clip=0.5)], ids=["sgd", "momentum", "adam", "clip"])
def test_sequential_equals_a_plain_loop_bit_for_bit(optimizer):
    group, data = net_group(2), batches([13, 7])
    trained, metrics = fit(group, {"model": Net()}, [Turn(("model",), cross_entropy, optimizer)], data, engine="sequential", channels_last=False)
    for index, client in enumerate(group.clients):
        state, loss = plain(group, client, data, optimizer)
        got = tree.row(trained.part("model"), index)
        for path in state:
            assert torch.equal(got[path], state[path]), path
        assert metrics["loss"][index].item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("frozen_norm", [False, True])
@pytest.mark.parametrize("optimizer", [SGD, ADAM, Optimizer("sgd", 0.1, clip=0.5)], ids=["momentum", "adam", "clip"])
def test_engines_agree_with_batchnorm_and_uneven_shards(optimizer, frozen_norm):
    group, turns, data = net_group(4), [Turn(("model",), cross_entropy, optimizer)], batches([13, 7, 10, 3])
    (one, measured), (other, measured_too) = (fit(group, {"model": Net()}, turns, data, engine=engine, frozen_norm=frozen_norm) for engine in ENGINES)
    close(one.state, other.state)
    close(measured, measured_too)
    counts = one.state["model/body.1.num_batches_tracked"].tolist()
    assert counts == ([0] * 4 if frozen_norm else [3, 2, 2, 1])
    assert torch.equal(one.state["model/body.1.running_mean"], group.state["model/body.1.running_mean"]) == frozen_norm


def test_a_client_is_the_same_bits_in_any_group():
    data, turns = batches([13, 7, 10]), [Turn(("model",), cross_entropy, ADAM)]
    group = net_group(3)
    together = fit(group, {"model": Net()}, turns, data)[0].states()
    for client in group.clients:
        alone = fit(group.select([client]), {"model": Net()}, turns, data)[0].states()[client]
        assert tree.equal(alone, together[client])


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_of_one_group_may_have_taken_different_numbers_of_adam_steps(engine):
    turns, data = [Turn(("model",), cross_entropy, ADAM)], batches([20, 10])
    group = net_group(2)
    ahead = fit(group.select([0]), {"model": Net()}, turns, data, keep_optimizer=True, engine=engine)[0]
    mixed = group.with_rows(ahead)
    assert mixed.state["optimizer/model/step/head.bias"].tolist() == [4, 0]
    trained = fit(mixed, {"model": Net()}, turns, data, keep_optimizer=True, engine=engine)[0]
    assert trained.state["optimizer/model/step/head.bias"].tolist() == [8, 2]
    fresh = fit(group.select([1]), {"model": Net()}, turns, data, keep_optimizer=True, engine=engine)[0]
    close(trained.states()[1], fresh.states()[1])
    close(trained.states()[0], fit(ahead, {"model": Net()}, turns, data, keep_optimizer=True, engine=engine)[0].states()[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_loss_leaves_out_is_neither_moved_nor_decayed(engine):
    group = net_group(2)

    def loss(modules, batch, context):
        return modules.model.features(batch["x"]).square().mean()
    trained = fit(group, {"model": Net()}, [Turn(("model",), loss, ADAM)], batches([10, 7]), engine=engine, keep_optimizer=True)[0]
    assert torch.equal(trained.state["model/head.weight"], group.state["model/head.weight"])
    assert trained.state["optimizer/model/step/head.weight"].tolist() == [0, 0]
    assert trained.state["optimizer/model/step/body.0.weight"].tolist() == [2, 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_share_or_repeat_memory_are_applied_right(engine):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Parameter(torch.zeros(3, 2)) for _ in range(3))
    group = Group.from_states("sum", states(Sum, "model", 2))

    def loss(modules, batch, context):
        m = modules.model
        return (m.one + m.two).sum() + (m.three.t() * batch["w"]).sum()
    w = torch.arange(6.0).view(2, 3)
    trained = fit(group, {"model": Sum()}, [Turn(("model",), loss, Optimizer("sgd", 1.0, clip=1.0))], lambda client: [{"w": w}], engine=engine)[0]
    norm, ones = math.sqrt(12 + w.square().sum()), torch.ones(3, 2)
    close(tree.row(trained.state, 1), {"model/one": -ones / norm, "model/two": -ones / norm, "model/three": -w.t() / norm})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_without_batches_stays_as_it_is(engine):
    group = net_group(2)
    trained, metrics = fit(group, {"model": Net()}, [Turn(("model",), cross_entropy, SGD)],
                           lambda client: batches([10])(client) if client == 0 else (), engine=engine)
    assert tree.equal(trained.states()[1], group.states()[1]) and not tree.equal(trained.states()[0], group.states()[0])
    assert metrics["loss"].isnan().tolist() == [False, True]
