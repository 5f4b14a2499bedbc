"""FedProto: prototypes and loss in NumPy, classes that nobody brought, and what crosses the wire."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpcfl.algorithms.fedproto import FedProto, loss
from hpcfl.training.evaluate import extract_features
from hpcfl.training.turns import Modules
from tests.support.baselines import CLASSES, FOUR, went
from tests.support.feature_methods import SIZE
from tests.support.in_memory import step


def test_prototypes_are_means_weighted_by_the_images_of_each_class():
    found = went("fedproto")
    labels, sums, counts = found.world.corpus.train_labels, np.zeros((CLASSES, SIZE)), np.zeros(CLASSES)
    for group in found.states[1].groups:
        for client in group.clients:
            z = extract_features(group, found.world.modules[group.architecture], client, found.world.holdings[client].train).double().numpy()
            y = labels[found.world.split.train[client]]
            np.add.at(sums, y, z)
            counts += np.bincount(y, minlength=CLASSES)
    server = found.states[1].server
    assert server["has"].bool().tolist() == (counts > 0).tolist()
    np.testing.assert_allclose(server["prototypes"].numpy(), sums / np.maximum(counts, 1)[:, None], rtol=1e-5, atol=1e-6)


def test_a_class_that_nobody_brought_keeps_its_prototype():
    found = went("fedproto", federation=FOUR | {"participation": 0.25, "rounds": 4}, data={"partition": "disjoint"})
    had, kept = np.zeros(CLASSES, bool), 0
    for place, before, after in zip(found.places, found.states, found.states[1:], strict=False):
        (client,) = found.world.cohort(place.phase, place.row)
        held = np.bincount(found.world.corpus.train_labels[found.world.split.train[client]], minlength=CLASSES) > 0
        old = torch.from_numpy(had & ~held)
        had, kept = had | held, kept + int(old.sum())
        assert after.server["has"].bool().tolist() == had.tolist()
        assert torch.equal(after.server["prototypes"][old], before.server["prototypes"][old])
        assert not after.server["prototypes"][torch.from_numpy(~had)].any()
    assert kept > 0


def test_the_loss_of_fedproto_is_cross_entropy_and_the_mean_squared_distance():
    found = went("fedproto")
    model, shard = found.world.modules["mlp2"]["model"].eval(), found.world.holdings[0].train
    x, y = shard.pixels(slice(0, 8)), shard.labels[:8]
    has, prototypes = torch.ones(CLASSES, dtype=torch.bool), torch.randn(CLASSES, SIZE)
    has[int(y[0])] = False
    with torch.no_grad():
        value, measured = loss(Modules({"model": model}), {"x": x, "y": y},
                               {"prototypes": prototypes, "has": has, "weight": torch.ones(SIZE), "strength": torch.tensor(0.3)})
        z = model.features(x)
        distances = [float((z[i] - prototypes[y[i]]).square().mean()) if has[y[i]] else 0.0 for i in range(8)]
        assert float(value) == pytest.approx(float(F.cross_entropy(model(x), y)) + 0.3 * np.mean(distances), rel=1e-5)
        assert float(measured["alignment"]) == pytest.approx(np.mean(distances), rel=1e-5)


def test_fedproto_sends_prototypes_and_counts_and_no_weight():
    found = went("fedproto")
    assert set(found.accounts[1]["up"].values()) == {4 * CLASSES * SIZE + 8 * CLASSES}
    assert set(found.accounts[1]["down"].values()) == {4 * CLASSES * SIZE + CLASSES}
    assert set(step(found.world, FedProto).publish(found.states[1].server)) == {"prototypes", "has"}
