"""FedGH: the global header's descent on mean features in NumPy, and what a client gets and pays for."""
import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.algorithms.shared_head import HEAD, take_head
from hpcfl.tree import Tree
from tests.support.feature_methods import CLASSES, CLIENTS, HEAD_BYTES, SIZE, labels_of, prototypes_of, server_site, usual, went
from tests.support.in_memory import bits


def descended(head: Tree, z: np.ndarray, y: np.ndarray, lr: float, order) -> dict[str, np.ndarray]:
    """SGD of CE(W z + b, y) by hand, one step for each array of indices in `order`."""
    weight, bias = (head[path].double().numpy().copy() for path in HEAD)
    for chosen in order:
        logits = z[chosen] @ weight.T + bias
        error = np.exp(logits - logits.max(1, keepdims=True))
        error = (error / error.sum(1, keepdims=True) - np.eye(CLASSES)[y[chosen]]) / len(chosen)
        weight, bias = weight - lr * error.T @ z[chosen], bias - lr * error.sum(0)
    return dict(zip(HEAD, (weight, bias), strict=True))


@pytest.mark.parametrize(("batch", "passes"), [(1, 1), (4, 2)])
def test_the_global_header_descends_on_the_mean_features_of_each_clients_classes(batch, passes):
    found, _ = went("fedgh", {"server_batch": batch, "server_epochs": passes})
    z, y = prototypes_of(found, 1)
    generator = server_site(found).stream("pairs").torch()
    order = [chosen.numpy() for _ in range(passes) for chosen in torch.randperm(len(y), generator=generator).split(batch)]
    want = descended(found.states[0].server, z, y, 0.1, order)
    for path in HEAD:
        np.testing.assert_allclose(found.states[1].server[path].numpy(), want[path], rtol=1e-4, atol=1e-6)


def test_clients_of_fedgh_begin_a_round_with_the_global_header():
    found, before = went("fedgh", training={"lr": 1e-30})
    for client in range(CLIENTS):
        assert bits(take_head(tree.part(before[0][client], "model"))) == bits(take_head(found.states[0].server))
        assert bits(take_head(tree.part(before[1][client], "model"))) == bits(take_head(found.states[1].server))


def test_a_client_of_fedgh_pays_for_the_header_and_its_own_classes():
    found, _ = usual("fedgh")
    for client in range(CLIENTS):
        held = len(np.unique(labels_of(found, client)))
        assert [account["up"][client] for account in found.accounts] == [held * (4 * SIZE + 4)] * 2
        assert [account["down"][client] for account in found.accounts] == [2 * HEAD_BYTES, HEAD_BYTES]
    assert len({found.accounts[0]["up"][client] for client in range(CLIENTS)}) > 1
