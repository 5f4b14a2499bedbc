"""MobileNetV2 and GoogLeNet: as many weights as in torchvision, stems for small images, and norms as a choice."""
import pytest
import torch
import torchvision
from torch import nn

from hpcfl.models import zoo

COLOUR = (3, 32, 32)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_mobilenet_has_the_weights_of_torchvisions():
    with torch.device("meta"):
        model, theirs = zoo.build("mobilenet_v2", COLOUR, 10, 0), torchvision.models.mobilenet_v2()
    assert parameters(model.body) == parameters(theirs.features) == 2_223_872 and model.feature_size == 1280


def test_googlenet_has_the_blocks_of_torchvisions_after_one_conv():
    with torch.device("meta"):
        model, theirs = zoo.build("googlenet", COLOUR, 10, 0), torchvision.models.GoogLeNet(aux_logits=False, init_weights=False)
    blocks = sum(parameters(block) for name, block in theirs.named_children() if name.startswith("inception"))
    assert parameters(model.body) == blocks + 27 * 192 + 2 * 192 and model.feature_size == 1024


@pytest.mark.parametrize("name, last, side", [("mobilenet_v2", "last", 4), ("googlenet", "stage3_block2", 8)])
def test_small_images_keep_maps_to_the_end(name, last, side):
    model, seen = zoo.build(f"{name}@0.25", COLOUR, 10, 0).eval(), []
    model.body.get_submodule(last).register_forward_hook(lambda layer, inputs, output: seen.append(output.shape[2:]))
    model(torch.zeros(1, *COLOUR))
    assert seen == [(side, side)]


@pytest.mark.parametrize("name", ["mobilenet_v2@0.25", "googlenet@0.25"])
def test_the_norm_is_a_choice(name):
    kinds = [{type(layer) for layer in zoo.build(name, COLOUR, 10, 0, norm).modules()} & {nn.BatchNorm2d, nn.GroupNorm} for norm in ("batch", "group")]
    assert kinds == [{nn.BatchNorm2d}, {nn.GroupNorm}]
