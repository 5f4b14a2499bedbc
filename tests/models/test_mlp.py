"""Fully connected networks: depth, the common first layer, and widths."""
import pytest
import torch
from torch import nn

from hpcfl.models import zoo
from hpcfl.models.mlp import Mlp


def test_the_first_layer_of_an_mlp_is_shrunk_because_it_holds_most_weights():
    assert zoo.build("mlp3@0.5", (1, 28, 28), 10).maps_shape == (98,)


@pytest.mark.parametrize("depth", range(2, 7))
def test_depth_counts_the_extractor_and_the_head(depth):
    model = zoo.build(f"mlp{depth}", (1, 28, 28), 10, 0)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == depth and (layers[0].in_features, layers[0].out_features) == (784, 196)
    assert [layer.out_features for layer in layers[1:]] == [128] * (depth - 2) + [10]


def test_colour_images_are_flattened_to_a_quarter_of_their_values():
    trunk = Mlp(3, hidden=8).build_trunk((3, 4, 4), "batch", 1.0)
    assert trunk.maps == (12,) and trunk.size == 8
    assert trunk.body(trunk.extractor(torch.zeros(2, 3, 4, 4))).shape == (2, 8)
