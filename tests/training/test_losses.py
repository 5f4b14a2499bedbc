"""Losses by hand: cross-entropy of the model, distance to prototypes, and the divergence of two softmaxes."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch.func import vmap
from torch.nn import functional as F

from hpcfl.training.losses import cross_entropy, divergence, prototype_distance


def test_cross_entropy_is_the_mean_surprise_of_the_models_answers():
    modules = SimpleNamespace(model=lambda x: torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]))
    loss = cross_entropy(modules, {"x": torch.zeros(2, 1), "y": torch.tensor([1, 0])}, {})
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_the_distance_to_prototypes_counts_no_image_of_a_class_without_one():
    z, y = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([0, 1])
    prototypes, has = torch.tensor([[0.0, 0.0], [9.0, 9.0]]), torch.tensor([True, False])
    assert prototype_distance(z, y, prototypes, has, torch.ones(2)).item() == pytest.approx((1 + 4) / 4)
    assert prototype_distance(z, y, prototypes, has, torch.tensor([0.5, 1.5])).item() == pytest.approx((0.5 + 6) / 4)
    assert prototype_distance(z, y, prototypes, has, torch.tensor([[2.0, 0.0], [1.0, 1.0]])).item() == pytest.approx(2 / 4)


def test_divergence_is_that_of_torch_zero_of_itself_and_works_under_vmap():
    p, q = (torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(2) for seed in (0, 1))
    assert divergence(p[0], p[0]).item() == 0.0
    torch.testing.assert_close(divergence(p[0], q[0]), F.kl_div(q[0], p[0], reduction="batchmean", log_target=True))
    torch.testing.assert_close(vmap(divergence)(p, q), torch.stack([divergence(*pair) for pair in zip(p, q, strict=True)]))
