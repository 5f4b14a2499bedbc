"""Residual networks: the parameters of their blocks, shortcuts, and strides."""
import pytest
import torch
from torch import nn

from hpcfl.models import zoo
from hpcfl.models.resnet import BasicBlock

COLOUR = (3, 32, 32)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["resnet8", "resnet10", "resnet18", "resnet34"])
def test_resnets_have_the_parameters_of_their_blocks(name):
    net = zoo.ENTRIES[name]
    wanted, channels = 27 * 64 + 2 * 64, 64
    for stage, (count, width) in enumerate(zip(net.blocks, net.widths, strict=False)):
        for index in range(count):
            wanted += 9 * channels * width + 9 * width * width + 4 * width
            wanted += (channels * width + 2 * width) if stage and not index else 0
            channels = width
    with torch.device("meta"):
        assert parameters(zoo.build(name, COLOUR, 10, 0)) == wanted + 10 * channels + 10


def test_a_block_halves_the_map_rounded_up_and_projects_where_its_shape_changes():
    assert BasicBlock(4, 8, 2, "batch")(torch.zeros(2, 4, 7, 5)).shape == (2, 8, 4, 3)
    assert isinstance(BasicBlock(4, 4, 1, "batch").shortcut, nn.Identity)
    assert BasicBlock(4, 8, 1, "group").shortcut[0].weight.shape == (8, 4, 1, 1)


def test_a_block_whose_convs_say_nothing_is_the_relu_of_its_input():
    block, x = BasicBlock(4, 4, 1, "batch").eval(), torch.randn(2, 4, 6, 6)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("stages, side", [((1,), 8), ((1, 1, 1), 2), ((1, 1, 1, 1), 1)])
def test_each_stage_but_the_first_halves_height_and_width(stages, side):
    layers = zoo.ResNet(stages, (4, 4, 4, 4)).build_trunk((1, 8, 8), "batch", 1.0).body
    assert layers[:-2](torch.zeros(2, 1, 8, 8)).shape[2:] == (side, side)
