"""Plain convolutional networks: the parameters of the published tables, the common extractor, and widths."""
import pytest
import torch

from hpcfl.models import zoo
from hpcfl.models.cnn import Cnn

GREY, COLOUR = (1, 32, 32), (3, 32, 32)
HEADERS = {                                  # GeFL, specification section 4: MNIST, FMNIST with norms, CIFAR-10
    "cnn1": (10_698, 10_730, 11_706),
    "cnn2": (10_218, 10_314, 11_226),
    "cnn3": (14_210, 14_330, 15_470),
    "cnn4": (5_310, 5_370, 5_940),
    "cnn5": (26_154, 26_378, 27_162),
    "cnn6": (39_890, 40_170, 41_150),
    "cnn7": (10_950, 11_090, 11_580),
    "cnn8": (98_730, 99_210, 99_738),
    "cnn9": (109_790, 110_270, 111_050),
    "cnn10": (39_030, 39_330, 39_660),
}
WIDTHS = (0.75, 0.5625, 0.42, 0.25)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def header_parameters(model):
    return parameters(model) - parameters(model.extractor)


@pytest.mark.parametrize("name", HEADERS)
def test_header_has_the_parameters_of_the_published_table(name):
    built = (zoo.build(name, GREY, 10, 0), zoo.build(f"{name}_bn", GREY, 10, 0), zoo.build(name, COLOUR, 10, 0))
    assert tuple(header_parameters(model) for model in built) == HEADERS[name]


@pytest.mark.parametrize("entry, shape, wanted, maps", [("cnn1", GREY, 36, (3, 16, 16)), ("cnn1_bn", GREY, 36, (3, 16, 16)),
                                                        ("cnn7_svhn", COLOUR, 90, (3, 16, 16)), ("cnn10", COLOUR, 390, (10, 16, 16))])
def test_common_extractor_has_the_published_parameters_and_maps(entry, shape, wanted, maps):
    model = zoo.build(entry, shape, 10)
    assert parameters(model.extractor) == wanted
    assert model.maps_shape == maps == tuple(model.extractor(torch.zeros(2, *shape)).shape[1:])


def test_all_ten_share_the_layout_of_the_extractor():
    layouts = [{path: leaf.shape for path, leaf in zoo.build(name, COLOUR, 10).extractor.state_dict().items()} for name in HEADERS]
    assert all(layout == layouts[0] for layout in layouts)


@pytest.mark.parametrize("features", [0, 512])
def test_benchmark_net_has_878538_parameters(features):
    assert parameters(zoo.build("w1", COLOUR, 10, features)) == 878_538


def test_fedconv_net_is_two_convs_and_one_linear_layer():
    assert parameters(zoo.build("fedconv", (1, 28, 28), 10, 0)) == (9 * 16 + 16) + (9 * 16 * 32 + 32) + (1568 * 10 + 10)


@pytest.mark.parametrize("name", HEADERS)
def test_all_ten_take_digits_of_8x8(name):
    assert zoo.build(name, (1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_width_rounds_down_as_fedconv_does():
    assert zoo.build(f"fedconv@{0.75**2}", GREY, 10, 0).body.conv1.out_channels == 9
    assert zoo.build(f"fedconv@{1 / 16}", GREY, 10, 0).body.conv1.out_channels == 1


@pytest.mark.parametrize("name", ["cnn3", "cnn8_bn", "cnn7_svhn"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_common_extractor_of_the_ten_is_never_shrunk(name, width):
    full, small = zoo.build(name, COLOUR, 10), zoo.build(f"{name}@{width}", COLOUR, 10)
    assert small.maps_shape == full.maps_shape
    assert [leaf.shape for leaf in small.extractor.state_dict().values()] == [leaf.shape for leaf in full.extractor.state_dict().values()]
    assert small.body.conv1.in_channels == full.body.conv1.in_channels and small.body.conv1.out_channels < full.body.conv1.out_channels


@pytest.mark.parametrize("net, smallest", [(Cnn((16,)), 1), (Cnn((32, 64), extractor="none", kernel=5, padding=0, hidden=512), 14),
                                           (Cnn((4,), extractor="none", kernel=3, padding=0), 3)])
def test_the_smallest_image_leaves_a_pixel_for_every_conv(net, smallest):
    assert net.find_smallest() == smallest
    trunk = net.build_trunk((1, smallest, smallest), "batch", 1.0)
    assert trunk.body(trunk.extractor(torch.zeros(2, 1, smallest, smallest)).detach()).shape == (2, trunk.size)
