"""A slice of a network computes what the network computes with its other channels at zero, whatever its branches, sums and heads."""
import copy

import pytest
import torch
from torch import nn

from hpcfl import tree
from hpcfl.errors import JobError, LayoutError
from hpcfl.models import zoo
from hpcfl.resize import slices

COLOUR, CLASSES = (3, 16, 16), 10


def built(name: str, features: int = 0, norm: str = "batch", shape=COLOUR):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return zoo.build(name, shape, CLASSES, features, norm)


def roughened(model: nn.Module) -> nn.Module:
    """Norms with gains, biases and running statistics of their own per channel, so that a channel taken for another is seen."""
    generator = torch.Generator().manual_seed(1)
    for leaf in model.state_dict().values():
        if leaf.is_floating_point() and leaf.dim() == 1:
            leaf.copy_(torch.rand(leaf.shape, generator=generator) + 0.5)
    return model


def widths(name: str, width: float, **how):
    return roughened(built(name, **how)), built(f"{name}@{width}", **how)


def images(model) -> torch.Tensor:
    return torch.randn(5, *model.shape, generator=torch.Generator().manual_seed(2))


def outputs(model: nn.Module, state) -> torch.Tensor:
    model = copy.deepcopy(model).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(images(model))


def zeroed(state, kept):
    """The full-size state with 0 in all that the slice does not keep."""
    return slices.put(tree.transform(state, torch.zeros_like), slices.take(state, kept), kept)


@pytest.mark.parametrize("shift", [0, 3, 1000])
@pytest.mark.parametrize("width", [0.75, 0.42])
@pytest.mark.parametrize(("name", "features"), [
    ("fedconv", 0), ("fedconv", 12), ("cnn1", 0), ("cnn2", 12), ("cnn9_bn", 0), ("cnn5_svhn", 12), ("w1", 12), ("mlp2", 12), ("mlp4", 0),
    ("resnet8", 0), ("resnet18", 12), ("mobilenet_v2", 12), ("googlenet", 0)])
def test_a_slice_computes_what_the_network_does_without_its_other_channels(name, features, width, shift):
    full, small = widths(name, width, features=features)
    kept = slices.find_axes(full, small, shift)
    state = full.state_dict()
    taken = slices.take(state, kept)
    assert {path: leaf.shape for path, leaf in taken.items()} == {path: leaf.shape for path, leaf in small.state_dict().items()}
    alone, inside = outputs(small, taken), outputs(full, zeroed(state, kept))
    torch.testing.assert_close(alone, inside, rtol=1e-4, atol=1e-4 * float(inside.abs().max()))
    assert not torch.allclose(alone, outputs(full, state), rtol=1e-2), "the comparison cannot fail"


@pytest.mark.parametrize("shift", [0, 5])
def test_a_slice_of_a_transformer_keeps_part_of_every_head(shift):
    full, small = widths("vit", 0.42)                              # heads of 6 out of 16 values
    kept = slices.find_axes(full, small, shift)
    window = sorted((shift + i) % 16 for i in range(6))
    for layer in ("q", "k", "v"):
        assert kept[f"body.block1.attention.{layer}.weight"][0].tolist() == [16 * head + value for head in range(4) for value in window]
    assert kept["body.block2.attention.out.weight"][1].tolist() == kept["body.block2.attention.v.bias"][0].tolist()
    stream = [(shift + i) % 64 for i in range(24)]
    assert kept["body.patches.positions"][1].tolist() == kept["body.block3.attention.out.weight"][0].tolist() == sorted(stream)

    class Nothing(nn.Module):
        def forward(self, x):
            return x
    for model in (full, small):                                    # LayerNorm divides by what all channels have in common: by others in a slice
        for name in [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Nothing())
    kept = {path: kept[path] for path in small.state_dict()}
    state = full.state_dict()
    inside = zeroed(state, kept)
    for path in inside:
        if ".q." in path:
            inside[path] = inside[path] * (16 / 6) ** 0.5          # a head divides by the root of its size
    torch.testing.assert_close(outputs(small, slices.take(state, kept)), outputs(full, inside), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_every_model_of_the_zoo_can_be_sliced(name):
    norm = "group" if name in ("resnet10", "googlenet") else "batch"
    full, small = widths(name, 0.5625, norm=norm)
    small.load_state_dict(slices.take(full.state_dict(), slices.find_axes(full, small, 7)))


def test_windows_are_counted_by_hand():
    assert slices.mark_window(6, 4).tolist() == [True, True, True, True, False, False]
    assert slices.mark_window(6, 4, shift=3).tolist() == [True, False, False, True, True, True]
    assert slices.mark_window(6, 4, shift=9).tolist() == slices.mark_window(6, 4, shift=3).tolist()
    assert slices.mark_window(6, 2, shift=2, blocks=2).tolist() == [False, False, True, False, False, True]
    assert slices.mark_window(5, 5, shift=3).all()


def test_image_channels_and_classes_stay_whole_and_the_first_channels_are_kept():
    full, small = widths("fedconv", 0.75)
    kept = slices.find_axes(full, small)
    assert [axis.tolist() for axis in kept["body.conv1.weight"][:2]] == [list(range(12)), [0, 1, 2]]
    assert [axis.tolist() for axis in kept["body.conv2.weight"][:2]] == [list(range(24)), list(range(12))]
    assert kept["head.weight"][0].tolist() == list(range(CLASSES))
    assert kept["head.weight"][1].tolist() == list(range(24 * 16))                        # each channel owns 4 x 4 inputs of the head


def test_a_joined_map_keeps_a_window_of_every_branch():
    full, small = widths("googlenet", 0.5)
    kept = slices.find_axes(full, small, shift=1)["body.stage1_block2.branch1.conv.weight"]
    starts, sizes = (0, 64, 192, 224), (64, 128, 32, 32)           # the branches of the block before
    assert kept[1].tolist() == [start + 1 + i for start, size in zip(starts, sizes, strict=True) for i in range(size // 2)]


def test_all_channels_of_the_full_size_are_kept_wherever_the_window_starts():
    full = built("resnet8")
    kept = slices.find_axes(full, built("resnet8"), shift=5)
    state = full.state_dict()
    assert all(leaf is state[path] for path, leaf in slices.take(state, kept).items()), "what is kept whole needs no copy"


def test_what_is_added_or_put_lands_where_it_was_taken():
    full, small = widths("cnn2_bn", 0.5)
    kept, state = slices.find_axes(full, small, 3), tree.select_floating(full.state_dict())
    out = tree.transform(state, lambda leaf: torch.zeros_like(leaf, dtype=torch.float64))
    ones = tree.transform(slices.take(state, kept), torch.ones_like)
    slices.add_to(out, ones, kept)
    slices.add_to(out, ones, kept)
    assert {path: int(leaf.sum()) for path, leaf in out.items()} == {path: 2 * leaf.numel() for path, leaf in ones.items()}
    assert all(torch.equal(slices.take(out, kept)[path], 2.0 * leaf) for path, leaf in ones.items())
    halved = slices.put(state, tree.transform(slices.take(state, kept), lambda leaf: leaf / 2), kept)
    for path, leaf in state.items():
        assert torch.equal(halved[path], torch.where(out[path] > 0, leaf / 2, leaf)) and halved[path] is not leaf


def test_slicing_draws_nothing_and_leaves_the_networks_alone():
    full, small = widths("vit", 0.5)
    before, drawn = tree.clone(full.state_dict()), torch.get_rng_state()
    slices.find_axes(full, small, 2)
    assert tree.equal(before, full.state_dict()) and torch.equal(drawn, torch.get_rng_state())
    assert full.training and not any(module._forward_hooks for module in full.modules())


@pytest.mark.parametrize("features", [256, 128])
def test_a_projection_that_only_one_width_has_is_refused(features):
    with pytest.raises(JobError, match=f"'projection.bias'.*models.feature_size = {features} is the size"):
        slices.find_axes(*widths("resnet8", 0.5, features=features))


def test_channels_of_different_windows_cannot_be_added():
    class Sum(nn.Module):
        def __init__(self, inner: int, skip: int):
            super().__init__()
            self.shape, self.feature_size = (3, 4, 4), 0
            self.one, self.two, self.grow = nn.Conv2d(3, inner, 1), nn.Conv2d(3, skip, 1), nn.Conv2d(inner, 8, 1)

        def forward(self, x):
            return self.grow(self.one(x) + self.two(x)[:, :self.one.weight.shape[0]])
    with pytest.raises(LayoutError, match=r"'grow.weight': channels that arrive are \(8, 5, 1, 1\) of \(8, 6, 1, 1\)"):
        slices.find_axes(Sum(6, 6), Sum(4, 4 + 1))
