"""Derived: a classifier whose weights are computed: gradients reach what computes them, buffers are its own, and no module is patched."""
import pytest
import torch
from torch import nn

from hpcfl import tree
from hpcfl.models import zoo
from hpcfl.resize.derived import Derived, from_channels_last, to_channels_last

SHAPE = (1, 8, 8)


class Scaled(Derived):
    """Every weight of the structure times one learned factor."""

    def __init__(self, structure: nn.Module) -> None:
        super().__init__(structure)
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.fixed = {path: parameter.detach().clone() for path, parameter in structure.named_parameters()}

    def derive_parameters(self):
        return {path: self.factor * leaf for path, leaf in self.fixed.items()}


def small(name: str = "cnn1_bn") -> nn.Module:
    torch.manual_seed(0)
    return zoo.build(name, SHAPE, 4, 0)


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_it_computes_what_the_classifier_computes_with_these_weights():
    structure = small()
    module = Scaled(structure).eval()
    assert torch.equal(module(images()), structure.eval()(images()))
    module.factor.data.fill_(0.0)
    assert not module(images()).any()
    assert {path for path, _ in module.named_parameters()} == {"factor"} and module.weights().keys() == structure.state_dict().keys()


def test_gradients_reach_the_factor_and_the_structure_is_never_written():
    structure = small()
    before = tree.clone(structure.state_dict())
    module = Scaled(structure).train()
    module(images()).square().mean().backward()
    assert module.factor.grad.abs() > 0
    assert tree.equal(structure.state_dict(), before) and all(parameter.grad is None for parameter in structure.parameters())


def test_running_statistics_are_its_own_begin_anew_and_follow_the_mode():
    structure = small().train()
    structure(images())                                            # has statistics that must not be taken over
    module = Scaled(structure)
    (mean,) = (path for path in module.weights() if path == "extractor.norm1.running_mean")
    assert not module.weights()[mean].any()
    module.eval()(images())
    assert not module.weights()[mean].any()
    module.train()(images())
    assert module.weights()[mean].any() and int(module.weights()["extractor.norm1.num_batches_tracked"]) == 1
    assert set(module.state_dict()) == {"factor", *(f"buffer:{path.replace('.', ':')}" for path, _ in structure.named_buffers())}


def test_buffers_of_another_size_keep_their_leading_part_and_counters_begin_at_zero():
    large, narrow = (zoo.build(name, SHAPE, 4, 0) for name in ("cnn1_bn", "cnn1_bn@0.5"))
    source = {path: torch.arange(1.0, 1.0 + leaf.numel()).view(leaf.shape) if leaf.is_floating_point() else torch.tensor(9)
              for path, leaf in large.state_dict().items()}
    shrunk = Scaled(narrow).derive_buffers(source)
    assert shrunk["buffer:body:norm1:running_mean"].tolist() == list(range(1, 9)) and int(shrunk["buffer:body:norm1:num_batches_tracked"]) == 0
    grown = Scaled(large).derive_buffers(dict(narrow.state_dict()) | {"body.norm1.running_mean": torch.ones(8)})
    assert not grown["buffer:body:norm1:running_mean"].any() and grown["buffer:body:norm1:running_var"].tolist() == [1.0] * 16


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 2), (7,), ()])
def test_what_is_laid_out_channels_last_comes_back_as_it_was(shape):
    weight = torch.randn(shape)
    laid_out = to_channels_last(weight)
    assert torch.equal(from_channels_last(laid_out, shape), weight)
    if len(shape) == 4:
        assert laid_out.shape == (3, 4, 5, 2) and from_channels_last(laid_out.flatten(), shape).is_contiguous(memory_format=torch.channels_last)
