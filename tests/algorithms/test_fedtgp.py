"""FedTGP: margin, contrastive loss and one step of the server in NumPy, which classes have a prototype, and what crosses the wire."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcfl import tree
from hpcfl.algorithms.fedtgp import FedTGP, GlobalPrototypes, compute_margin, contrastive_loss
from hpcfl.training.turns import Modules
from hpcfl.wire.uplink import Uploads
from tests.support.feature_methods import CLASSES, CLIENTS, FOUR, SIZE, labels_of, prototypes_of, server_site, usual, went
from tests.support.in_memory import bits, job, run, step, world


def test_the_margin_is_the_largest_distance_to_the_nearest_or_to_the_furthest_class():
    means = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 4.0], [11.0, 0.0]])                    # classes at (1, 0), (1, 4) and (11, 0)
    classes = torch.tensor([3, 3, 5, 7])
    assert float(compute_margin(means, classes, "nearest", 100.0)) == pytest.approx(10.0)              # nearest: 4, 4 and 10
    assert float(compute_margin(means, classes, "furthest", 100.0)) == pytest.approx(math.hypot(10, 4))
    assert float(compute_margin(means, classes, "nearest", 2.5)) == 2.5
    assert [float(compute_margin(means[:2], classes[:2], rule, 100.0)) for rule in ("nearest", "furthest")] == [0.0, 0.0]


def test_the_contrastive_loss_keeps_ones_own_prototype_nearer_by_the_margin():
    torch.manual_seed(0)
    network, z, y = GlobalPrototypes(CLASSES, SIZE), torch.randn(5, SIZE), torch.tensor([0, 3, 3, 9, 1])
    got = contrastive_loss(Modules({"prototypes": network}), {"z": z, "y": y}, {"margin": torch.tensor(0.7)})
    centres, terms = network().detach().double().numpy(), []
    for row, label in zip(z.double().numpy(), y.tolist(), strict=True):
        distances = np.sqrt(((row - centres) ** 2).sum(1))
        others = np.exp(-np.delete(distances, label)).sum()
        own = np.exp(-(distances[label] + 0.7))
        terms.append(-np.log(own / (own + others)))
    assert float(got.detach()) == pytest.approx(np.mean(terms), rel=1e-5)


def test_the_contrastive_loss_has_a_slope_where_a_prototype_is_met():
    network = GlobalPrototypes(CLASSES, SIZE)
    loss = contrastive_loss(Modules({"prototypes": network}), {"z": network()[2:3].detach(), "y": torch.tensor([2])}, {"margin": torch.tensor(1.0)})
    loss.backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in network.parameters())


def test_trained_prototypes_lie_next_to_those_of_their_own_class():
    found, _ = went("fedtgp", {"server_epochs": 200, "server_lr": 0.05})
    z, noise = 2 * torch.eye(CLASSES, SIZE)[:SIZE], 0.1 * torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    uploads = Uploads({client: {"means": z + noise[client], "classes": torch.arange(SIZE, dtype=torch.int32)} for client in range(2)})
    server = step(found.world, FedTGP).aggregate(found.states[0].server, {"prototypes": uploads}, server_site(found))
    assert torch.cdist(z, server["prototypes"]).argmin(1).tolist() == list(range(SIZE))
    assert server["has"].tolist() == [1] * SIZE + [0] * (CLASSES - SIZE)
    network = GlobalPrototypes(CLASSES, SIZE)
    network.load_state_dict(tree.part(server, "network"))
    torch.testing.assert_close(network().detach(), server["prototypes"])


def test_one_step_of_the_server_follows_the_gradient():
    found, _ = went("fedtgp", {"server_epochs": 1, "server_batch": 1000, "server_lr": 0.5})
    z, y = (torch.from_numpy(array) for array in prototypes_of(found, 1))
    network = GlobalPrototypes(CLASSES, SIZE).double()
    network.load_state_dict(tree.part(found.states[0].server, "network"))
    delta = compute_margin(z, y, "nearest", 100.0)
    logits = -torch.cdist(z, network()) - delta * F.one_hot(y, CLASSES)
    gradients = torch.autograd.grad(F.cross_entropy(logits, y), list(network.parameters()))
    for (path, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
        want = (parameter - 0.5 * gradient).detach().numpy()
        np.testing.assert_allclose(found.states[1].server[f"network/{path}"].numpy(), want, rtol=1e-4, atol=1e-5)
    assert found.accounts[0]["notes"]["margin"] == pytest.approx(float(delta), rel=1e-4)


def test_fedtgp_without_strength_trains_everybody_alone():
    found, _ = went("fedtgp", {"strength": 0.0})
    alone = run(world(job("standalone", federation=FOUR)))
    for client in range(CLIENTS):
        for path, leaf in alone.state(client).items():
            torch.testing.assert_close(found.state(client)[path], leaf, rtol=1e-5, atol=1e-6)
    guided, _ = usual("fedtgp")
    assert bits(guided.state(0, 1)) == bits(found.state(0, 1))                                  # nothing is known in the first round
    assert bits(guided.state(0, 2)) != bits(found.state(0, 2))


def test_fedtgp_sends_prototypes_and_no_weight():
    found, _ = usual("fedtgp")
    for client in range(CLIENTS):
        assert found.accounts[1]["up"][client] == len(np.unique(labels_of(found, client))) * (4 * SIZE + 4)
        assert found.accounts[1]["down"][client] == 4 * CLASSES * SIZE + CLASSES
    assert set(step(found.world, FedTGP).publish(found.states[-1].server)) == {"prototypes", "has"}


def test_only_classes_that_somebody_brought_have_a_global_prototype():
    found, _ = went("fedtgp", federation=FOUR | {"participation": 0.25, "rounds": 3}, data={"partition": "disjoint"})
    had = np.zeros(CLASSES, bool)
    for place, state in zip(found.places, found.states[1:], strict=True):
        (client,) = found.world.cohort(place.phase, place.row)
        had[np.unique(labels_of(found, client))] = True
        assert state.server["has"].bool().tolist() == had.tolist()
    assert not had.all()
