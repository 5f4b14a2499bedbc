"""CCVR against its formulas in NumPy: federated averaging with one head, Gaussians of features, and a head calibrated on draws from them."""
import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.algorithms import ccvr
from hpcfl.algorithms.ccvr import Calibrate, TakeHead, unbias_covariances
from hpcfl.algorithms.shared_head import HEAD
from hpcfl.latents import gaussians, moments
from hpcfl.tree import Tree
from tests.support.feature_methods import CLASSES, CLIENTS, FOUR, HEAD_BYTES, SIZE, features_of, labels_of, server_site, shares, usual, went
from tests.support.in_memory import Run, bits, changed, finite, job, run, step, world


def test_the_head_is_averaged_over_all_clients_and_the_rest_within_architectures():
    found, before = usual("ccvr")
    for name in ("mlp2", "cnn1"):
        own = [client for client in range(CLIENTS) if found.world.problem.architectures[client] == name]
        model = received(found, 1, name)
        for path, leaf in tree.select_floating(model).items():
            clients = range(CLIENTS) if path in HEAD else own
            rows = np.stack([before[0][client][f"model/{path}"].double().numpy() for client in clients])
            np.testing.assert_allclose(leaf.numpy(), np.tensordot(shares(found, clients), rows, 1), rtol=1e-5, atol=1e-7)
        found.world.problem.model(name).load_state_dict(model)


def received(found: Run, position: int, architecture: str) -> Tree:
    """The model that clients of an architecture have after some round."""
    return step(found.world, Calibrate).receive(found.states[position].server, architecture)


def test_with_architectures_apart_the_rounds_are_those_of_fedavg():
    found, _ = went("ccvr", {"scope": "architecture"})
    average = run(world(job("fedavg", federation=FOUR)))
    assert bits(found.states[2].server) == bits(average.states[2].server)
    free, _ = went("ccvr", {"scope": "architecture"}, models={"feature_size": 0})
    assert finite(free.states[-1].server) and len({leaf.shape for path, leaf in free.states[-1].server.items() if path.endswith(HEAD[0])}) == 2


@pytest.mark.parametrize("mode", ["class_full", "class_diag"])
def test_virtual_features_have_the_unbiased_covariance_of_all_clients_features(mode):
    generator = np.random.default_rng(0)
    z, y = generator.normal(size=(30, SIZE)) @ generator.normal(size=(SIZE, SIZE)), np.repeat([0, 0, 4], 10)
    y[0] = 7                                                                                    # a class with one sample
    pieces = [np.arange(30)[part::3] for part in range(3)]
    measured = [moments.measure(torch.from_numpy(z[piece]), torch.from_numpy(y[piece]), CLASSES, moments.needs_full(mode)) for piece in pieces]
    messages = [moments.to_message(each, mode, dtype=torch.float64) for each in measured]
    estimate = moments.aggregate(messages, mode)
    factor = gaussians.compute_factors(unbias_covariances(estimate, floor=1e-3)).numpy()
    for label in (0, 4, 7):
        covariance = np.cov(z[y == label].T) if label != 7 else np.zeros((SIZE, SIZE))
        got = factor[label] @ factor[label].T if mode == "class_full" else np.diag(factor[label] ** 2)
        want = covariance if mode == "class_full" else np.diag(np.diag(covariance))
        np.testing.assert_allclose(got, want + 1e-3 * np.eye(SIZE), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(estimate.mean[label], z[y == label].mean(0), atol=1e-12)


def test_the_virtual_set_is_balanced_over_the_classes_there_are_and_the_same_in_every_epoch(monkeypatch):
    drawn = []

    def keep(head, batches, *rest):
        drawn.append(list(batches))
        return head
    monkeypatch.setattr(ccvr, "train_head", keep)
    found, _ = went("ccvr", {"per_class": 3000, "epochs": 2, "batch": 1000}, data={"partition": "disjoint", "fraction": 0.1})
    (batches,) = drawn
    z, y = (torch.cat([batch[name] for batch in batches]) for name in ("x", "y"))
    half = len(y) // 2
    assert torch.equal(z[:half], z[half:]) and torch.equal(y[:half], y[half:])
    pooled = np.concatenate([features_of(found, client, 2) for client in range(CLIENTS)])
    labels = np.concatenate([labels_of(found, client) for client in range(CLIENTS)])
    assert y[:half].bincount(minlength=CLASSES).tolist() == (3000 * (np.bincount(labels, minlength=CLASSES) > 0)).tolist()
    for label in np.unique(labels):
        mine = pooled[labels == label]
        near = 5 * np.sqrt((mine.var(0) + 1e-3) / 3000) + 1e-3
        assert (np.abs(z[:half][y[:half] == label].numpy().mean(0) - mine.mean(0)) < near).all()


def test_calibration_turns_statistics_into_a_head_that_tells_classes_apart():
    found, _ = went("ccvr", {"per_class": 100, "epochs": 20, "lr": 0.1})
    algorithm = step(found.world, Calibrate)
    mean = 3 * torch.eye(CLASSES, SIZE, dtype=torch.float64)
    has = torch.arange(CLASSES) < SIZE
    spread = 0.1 * torch.eye(SIZE, dtype=torch.float64).expand(CLASSES, -1, -1)
    known = moments.ClassGaussians(has, mean, spread, 50.0 * has, torch.tensor(0.0), torch.tensor(0.0))
    zeros = {"head.weight": torch.zeros(CLASSES, SIZE), "head.bias": torch.zeros(CLASSES)}
    head = algorithm.calibrate(zeros, known, "common", server_site(found, 1))
    assert (mean[:SIZE].float() @ head["head.weight"].T + head["head.bias"]).argmax(1).tolist() == list(range(SIZE))


@pytest.mark.parametrize("scope", ["all", "architecture"])
def test_calibration_changes_heads_and_nothing_else(scope):
    found, _ = went("ccvr", {"scope": scope}, federation=FOUR | {"participation": 0.5})
    heads = {"common/head"} if scope == "all" else {"mlp2/head", "cnn1/head"}
    assert changed(found.states[2].server, found.states[3].server) == heads
    for client in range(CLIENTS):                                                               # also those that were in no cohort
        model = received(found, 3, found.world.problem.architectures[client])
        assert bits(tree.part(found.state(client), "model")) == bits(model)


def test_a_client_of_ccvr_pays_for_moments_once_and_gets_a_head():
    found, _ = usual("ccvr")
    for client in range(CLIENTS):
        model = tree.nbytes(tree.select_floating(received(found, 0, found.world.problem.architectures[client])))
        assert found.accounts[0]["up"][client] == model + 8                                     # the head is not sent twice
        assert found.accounts[2]["up"][client] == 8 * CLASSES + 4 * CLASSES * (SIZE + SIZE * (SIZE + 1) // 2)
        assert found.accounts[2]["down"][client] == HEAD_BYTES
    models = step(found.world, Calibrate).global_models(found.states[-1].server)
    assert set(models) == {"mlp2", "cnn1"}
    assert set(step(found.world, TakeHead).publish(found.states[-1].server)) == {f"common/{path}" for path in HEAD}
