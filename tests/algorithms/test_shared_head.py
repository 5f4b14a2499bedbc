"""A head that clients share: what FedGH, FedGen and CCVR, and FedTGP with its prototypes, have in common."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hpcfl import tree
from hpcfl.algorithms.shared_head import HEAD, prefix_head, take_head, train_head
from hpcfl.errors import JobError
from hpcfl.training.optimizers import Optimizer
from tests.support.feature_methods import CLASSES, CLIENTS, FEW, SIZE, server_site, usual, went
from tests.support.in_memory import bits, changed, finite, job, world

METHODS = pytest.mark.parametrize("name", FEW)


@METHODS
def test_both_engines_train_alike(name):
    one, other = (went(name, training={"engine": engine})[0].states[-1].server for engine in ("sequential", "vmap"))
    assert one.keys() == other.keys() and finite(one)
    for path in one:
        torch.testing.assert_close(one[path], other[path], rtol=1e-3, atol=1e-4)


@METHODS
def test_features_of_different_sizes_have_nothing_to_share(name):
    with pytest.raises(JobError, match="models.feature_size = 0"):
        went(name, models={"feature_size": 0})


@pytest.mark.parametrize("name", ["fedgh", "fedgen"])
def test_only_heads_are_common_and_all_clients_end_with_the_same(name):
    found, before = usual(name)
    for client in range(CLIENTS):
        own = tree.part(found.state(client), "model")
        assert bits(take_head(own)) == bits(take_head(found.states[-1].server))
        assert changed(before[-1][client], found.state(client)) == {"model/head"}
    (one, other) = (tree.part(found.state(client), "model") for client in (0, 2))              # of one architecture, with extractors of their own
    assert all(not torch.equal(one[path], other[path]) for path in one if path.endswith("weight") and path not in HEAD)


def test_a_head_lies_under_the_paths_that_it_has_in_a_model_of_the_zoo():
    model = world(job("fedgh")).problem.model("cnn1")
    assert bits(prefix_head(model.head.state_dict())) == bits(take_head(model.state_dict()))


def test_the_server_trains_a_head_by_cross_entropy_and_notes_its_loss():
    """One step of SGD on one batch, against torch's own gradient; the head that it began with stays as it was."""
    found, _ = usual("fedgh")
    site = server_site(found)
    generator = torch.Generator().manual_seed(0)
    head = {"head.weight": torch.randn(CLASSES, SIZE, generator=generator), "head.bias": torch.zeros(CLASSES)}
    x, y = torch.randn(5, SIZE, generator=generator), torch.tensor([0, 1, 1, 4, 9])
    before, noted = bits(head), []
    got = train_head(head, [{"x": x, "y": y}], Optimizer("sgd", 0.5), replace(site, note=lambda name, value: noted.append((name, value))), "the work")
    own = [leaf.clone().requires_grad_() for leaf in head.values()]
    loss = F.cross_entropy(F.linear(x, *own), y)
    for path, leaf, gradient in zip(head, own, torch.autograd.grad(loss, own), strict=True):
        torch.testing.assert_close(got[path], (leaf - 0.5 * gradient).detach())
    assert bits(head) == before
    assert noted == [("the work loss", pytest.approx(float(loss.detach()), rel=1e-5))]
