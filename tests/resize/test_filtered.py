"""Weight filters against one convolution per kernel position, shapes for the whole zoo, gradients, and one by one against all together."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpcfl.errors import LayoutError
from hpcfl.models import zoo
from hpcfl.resize.filtered import INITS, Filtered, WeightFilter, apply_mlr
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.losses import cross_entropy
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn
from hpcfl.tree import Tree, join, repeat, row, stack

COLOUR, RATIOS = (3, 16, 16), (0.75, 0.5625, 0.42, 0.25)
CASES = {                                                          # larger, smaller, whether a conv weight
    "conv": ((12, 8, 3, 3), (9, 6, 3, 3), True), "first conv": ((12, 1, 3, 3), (9, 1, 3, 3), True), "depthwise": ((8, 1, 5, 5), (6, 1, 5, 5), True),
    "linear": ((20, 16), (15, 12), False), "head": ((10, 16), (10, 12), False), "vector": ((16,), (12,), False), "bias of the head": ((10,), (10,), False),
    "same": ((4, 4, 3, 3), (4, 4, 3, 3), True), "table of positions": ((1, 5, 16), (1, 5, 12), False), "oblong kernel": ((6, 4, 1, 7), (5, 2, 1, 7), True)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def reference(each: WeightFilter, weight: torch.Tensor, target: tuple[int, ...]) -> torch.Tensor:
    """Specification, section 3: one position after the other, in float64, by torch's own convolutions."""
    convolve = F.conv_transpose2d if each.grows else F.conv2d
    positions = [weight[:, :, i, j] for i in range(weight.shape[2]) for j in range(weight.shape[3])] \
        if each.is_convolution else [weight.reshape(-1, weight.shape[-1])]
    results = []
    for number, image in enumerate(positions):
        image = image.double()
        u = each.gain[number].double() * image + each.bias[number].double() + (image if each.is_convolution else 0)
        kernel = each.norm[number].double()
        if each.direction is not None:
            v = each.direction[number].double()
            kernel = kernel * v / v.square().sum().sqrt()
        value = convolve(u[None, None], kernel.view(1, 1, *kernel.shape))[0, 0]
        for _ in range(each.mlr_passes):
            value = torch.where(value < 0, 0.001 * value, 0.85 * value)
        results.append(value)
    return (torch.stack(results, 2).view(target) if each.is_convolution else results[0].view(target)).detach()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_filter_equals_one_convolution_for_each_kernel_position(case, grows, passes, init):
    large, small, is_convolution = CASES[case]
    source, target = (small, large) if grows else (large, small)
    each = WeightFilter(source, target, is_convolution, passes)
    each.reset_parameters(init)
    weight = torch.randn(source)
    got, want = each(weight), reference(each, weight, target)
    assert got.shape == target
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_the_kernel_is_as_large_as_the_difference_of_the_sizes_and_one():
    assert WeightFilter((32, 16, 3, 3), (24, 12, 3, 3), True).direction.shape == (9, 9, 5)
    assert WeightFilter((10, 1176), (10, 1568), False).direction.shape == (1, 1, 393)
    assert WeightFilter((10,), (10,), False).direction is None


def test_mlr_has_the_slopes_of_the_paper_and_twice_those_of_the_code():
    v = torch.tensor([-2.0, 0.0, 2.0])
    torch.testing.assert_close(apply_mlr(v, 1), torch.tensor([-0.002, 0.0, 1.7]))
    torch.testing.assert_close(apply_mlr(v, 2), torch.tensor([-2e-6, 0.0, 1.445]))
    assert apply_mlr(v, 0) is v


def test_slice_begins_close_to_the_leading_channels_and_dilation_close_to_these_among_zeros():
    large, small = torch.randn(12, 8, 3, 3), torch.randn(9, 6, 3, 3)
    compress, dilate = WeightFilter(large.shape, small.shape, True, 0), WeightFilter(small.shape, large.shape, True, 0)
    padded = F.pad(small, (0, 0, 0, 0, 0, 2, 0, 3))
    with torch.no_grad():
        assert float((compress(large) - large[:9, :6]).norm() / large[:9, :6].norm()) < 0.3
        assert float((dilate(small) - padded).norm() / padded.norm()) < 0.3


@pytest.mark.parametrize("wrong", [((8, 6), (6, 8)), ((8, 6, 3, 3), (6, 4, 5, 5))])
def test_sizes_that_no_filter_can_join_are_refused(wrong):
    with pytest.raises(LayoutError, match="cannot be resized"):
        WeightFilter(*wrong, len(wrong[0]) == 4)


def state_of(module: Filtered, source: Tree) -> Tree:
    return dict(module.state_dict()) | module.derive_state(source)


def random(model: nn.Module) -> Tree:
    """A state without the zeros of a new model, of which no gain could learn anything."""
    return {path: leaf + 0.1 * torch.rand(leaf.shape) if leaf.is_floating_point() else leaf for path, leaf in model.state_dict().items()}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("name", "norm"), [*((name, "batch") for name in ("fedconv", "cnn5_bn", "mlp4", "resnet10", "mobilenet_v2", "googlenet", "vit")),
                                            *((name, "group") for name in ("cnn5_bn", "resnet10", "mobilenet_v2", "googlenet"))])
def test_compression_has_the_shapes_of_the_smaller_architecture_and_dilation_gives_the_larger_back(name, norm, ratio):
    large, small = zoo.build(name, COLOUR, 10, 0, norm), zoo.build(f"{name}@{ratio}", COLOUR, 10, 0, norm)
    for source, target in ((large, small), (small, large)):
        module = Filtered(source, target)
        module.load_state_dict(state_of(module, source.state_dict()))
        weights = module.weights()
        assert {path: leaf.shape for path, leaf in weights.items()} == {path: leaf.shape for path, leaf in target.state_dict().items()}
        target.load_state_dict({path: leaf.detach() for path, leaf in weights.items()})
        x = torch.randn(2, *COLOUR)
        want = target.eval()(x).detach()
        torch.testing.assert_close(module.eval()(x), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", sorted(zoo.ENTRIES))
def test_every_model_of_the_zoo_can_be_compressed_and_dilated(name):
    large = zoo.build(name, COLOUR, 10, 0)
    for ratio in RATIOS:
        small = zoo.build(name, COLOUR, 10, 0, width=ratio)
        for source, target in ((large, small), (small, large)):
            module = Filtered(source, target)
            assert {path: module.filters[path.replace(".", ":")].shape for path in module.paths} == \
                {path: tuple(parameter.shape) for path, parameter in target.named_parameters()}


def test_running_statistics_keep_their_leading_part_and_begin_anew_where_they_grow():
    large, small = zoo.build("resnet8", COLOUR, 10, 0), zoo.build("resnet8@0.5", COLOUR, 10, 0)
    large.body.norm.running_mean.copy_(torch.arange(64.0))
    small.body.norm.running_var.fill_(7.0)
    compressed, dilated = Filtered(large, small).derive_state(large.state_dict()), Filtered(small, large).derive_state(small.state_dict())
    assert compressed["buffer:body:norm:running_mean"].tolist() == list(range(32))
    assert not dilated["buffer:body:norm:running_mean"].any() and bool((dilated["buffer:body:norm:running_var"] == 1).all())
    assert int(dilated["buffer:body:norm:num_batches_tracked"]) == 0


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", ["fedconv", "cnn5_bn", "resnet8", "vit", "googlenet"])
def test_gradients_reach_every_filter_and_nothing_else(name, init):
    for source, target in ((name, f"{name}@0.5"), (f"{name}@0.5", name)):
        given, wanted = zoo.build(source, COLOUR, 10, 0), zoo.build(target, COLOUR, 10, 0)
        module = Filtered(given, wanted)
        module.reset_parameters(init)
        module.load_state_dict(state_of(module, random(given)))
        F.cross_entropy(module(torch.randn(16, *COLOUR)), torch.arange(16) % 10).backward()
        gradients = {path: parameter.grad for path, parameter in module.named_parameters() if parameter.requires_grad}
        assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
        dead = [path for path, gradient in gradients.items() if not gradient.any()]
        assert not dead or init == "default", f"{dead} get no gradient"      # filters as they come in PyTorch may silence a layer altogether
        assert all(leaf.grad is None for path, leaf in module.state_dict(keep_vars=True).items() if path not in gradients)


def trained(clients: tuple[int, ...], engine: str, name: str = "cnn5_bn@0.5") -> Group:
    """Dilation tuned for some clients, two batches of SGD each."""
    shape = (1, 8, 8)
    torch.manual_seed(5)
    given, wanted = zoo.build(name, shape, 10, 0), zoo.build("cnn5_bn", shape, 10, 0)
    module, states = Filtered(given, wanted), {}
    for client in clients:
        torch.manual_seed(client)
        with torch.no_grad():
            own = {path: torch.randn(leaf.shape) * 0.2 if leaf.is_floating_point() and "running" not in path else leaf
                   for path, leaf in given.state_dict().items()}
            module.reset_parameters()
        states[client] = join(model={path: leaf.clone() for path, leaf in state_of(module, own).items()})

    def batches(client):
        generator = torch.Generator().manual_seed(client)
        return [{"x": torch.randn(6, *shape, generator=generator), "y": torch.randint(10, (6,), generator=generator)} for _ in range(2)]
    return fit(Group.from_states("dilated", states), {"model": module}, [Turn(("model",), cross_entropy, Optimizer("sgd", 0.05))], batches,
               engine=engine, channels_last=False)[0]


def test_dilation_of_several_clients_together_equals_one_by_one():
    together = trained((1, 2, 5), "vmap")
    for index, client in enumerate(together.clients):
        alone = row(trained((client,), "sequential").state, 0)
        for path, leaf in row(together.state, index).items():
            torch.testing.assert_close(leaf, alone[path], rtol=1e-5, atol=1e-5)
    assert not torch.equal(together.part("model")["filters.head:weight.direction"][0], together.part("model")["filters.head:weight.direction"][1])


def test_tuning_changes_the_filters_and_the_running_statistics_and_not_the_source():
    given = zoo.build("cnn5_bn@0.5", (1, 8, 8), 10, 0)
    module = Filtered(given, zoo.build("cnn5_bn", (1, 8, 8), 10, 0))
    before = Group("dilated", (0,), repeat(join(model=state_of(module, random(given))), 1))
    batch = {"x": torch.randn(6, 1, 8, 8), "y": torch.arange(6)}
    after, _ = fit(before, {"model": module}, [Turn(("model",), cross_entropy, Optimizer("adam", 0.01))], lambda client: [batch])
    for path, leaf in before.state.items():
        assert torch.equal(leaf, after.state[path]) == path.startswith("model/source:"), path


def test_the_filters_are_all_that_learns():
    module = Filtered(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 10)), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 10)))
    assert {path.split(".")[0] for path, parameter in module.named_parameters() if parameter.requires_grad} == {"filters"}
    leaves = (torch.ones(4, 1, 3, 3), torch.ones(4), torch.ones(10, 4), torch.ones(10))
    assert stack([module.derive_state(dict(zip(module.paths, leaves, strict=True)))])
