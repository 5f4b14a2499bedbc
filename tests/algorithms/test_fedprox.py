"""FedProx against its formula in NumPy, and the FedAvg that it becomes."""
import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.algorithms.fedprox import FedProx
from hpcfl.training.turns import Modules
from tests.support.baselines import before_average, built, images, softmax, went
from tests.support.in_memory import bits, job, step, world


@pytest.mark.parametrize("norm", ["squared", "code"])
def test_the_loss_of_fedprox_is_cross_entropy_and_half_mu_times_the_norm(norm):
    found = world(job("fedprox", {"mu": 0.3, "norm": norm}))
    model, received = (built(found.problem, "cnn1", seed) for seed in (0, 1))
    x, y = images(found)
    value, measured = step(found, FedProx).loss(Modules({"model": model}), {"x": x, "y": y}, dict(received.state_dict()))
    apart = [(own - other).numpy() for own, other in zip(model.parameters(), received.parameters(), strict=True)]
    proximal = sum((each ** 2).sum() for each in apart) if norm == "squared" else sum(np.sqrt((each ** 2).sum()) for each in apart)
    labels = -np.log(softmax(model(x).numpy()))[np.arange(8), y.numpy()].mean()
    assert float(value) == pytest.approx(labels + 0.15 * proximal, rel=1e-10)
    assert float(measured["proximal"]) == pytest.approx(proximal, rel=1e-10)


def test_fedprox_without_its_term_is_fedavg():
    found, plain = went("fedprox", {"mu": 0.0}), went("fedavg")
    assert bits(found.states[-1].server) == bits(plain.states[-1].server)


@pytest.mark.parametrize("norm", ["squared", "code"])
def test_where_a_client_begins_the_proximal_term_has_no_gradient(norm):
    one_step = {"batch": 1000}
    found, plain = went("fedprox", {"mu": 100.0, "norm": norm}, training=one_step), went("fedavg", training=one_step)
    for path, leaf in plain.states[-1].server.items():
        torch.testing.assert_close(found.states[-1].server[path], leaf, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", ["squared", "code"])
def test_a_proximal_term_keeps_clients_near_what_they_received(norm):
    def moved(name, settings=None):
        found, before = before_average(name, settings, training={"epochs": 3})
        start = {client: tree.part(found.states[0].server, found.world.problem.architectures[client]) for client in before[0]}
        parameters = {client: [path for path in tree.select_floating(own) if "running" not in path] for client, own in before[0].items()}
        return [sum(float((own[path] - start[client][path]).square().sum()) for path in parameters[client]) for client, own in before[0].items()]
    assert all(near < 0.9 * far for near, far in zip(moved("fedprox", {"mu": 5.0, "norm": norm}), moved("fedavg"), strict=True))
