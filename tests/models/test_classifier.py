"""Model: the projection to the common size, the cuts at maps and features, and widths that leave no channel."""
import re

import pytest
import torch
from torch import nn

from hpcfl.errors import JobError, LayoutError
from hpcfl.models import zoo
from hpcfl.models.classifier import Model, Trunk, scale_width

GREY, COLOUR = (1, 32, 32), (3, 32, 32)


def test_a_body_that_has_the_common_size_already_is_not_projected():
    model = zoo.build("resnet8", GREY, 10, 256)
    assert not list(model.projection.parameters()) and model.feature_size == 256


def test_forward_is_head_of_features_and_header_of_maps():
    model = zoo.build("cnn6", COLOUR, 10).eval()
    x = torch.randn(3, *COLOUR)
    assert torch.equal(model(x), model.head(model.features(x)))
    assert torch.equal(model(x), model.header(model.extractor(x)))


def test_images_of_another_shape_are_refused_by_name():
    with pytest.raises(LayoutError, match=r"\(1, 32, 32\) got \(2, 3, 32, 32\)"):
        zoo.build("resnet8", GREY, 10)(torch.zeros(2, *COLOUR))


@pytest.mark.parametrize("name, channels, width, wanted", [("fedconv", 16, 0.01, "0.0625"), ("w1", 32, 0.03, "0.0313"), ("cnn4", 10, 0.09, "0.1"),
                                                           ("googlenet", 16, 0.06, "0.0625"), ("mlp3", 196, 0.005, "0.0052"),
                                                           ("vit", 16, 0.05, "0.0625")])
def test_a_width_that_leaves_no_channel_is_refused_with_the_smallest_that_does(name, channels, width, wanted):
    message = rf"'{name}@{width}': a hidden layer of {channels} channels has none left at width {width}; wanted a width of at least {wanted}: "
    with pytest.raises(JobError, match=message + r".*models\.sizes"):
        zoo.build(f"{name}@{width}", (1, 28, 28), 10)


@pytest.mark.parametrize("channels", [1, 3, 7, 16, 49, 196, 768, 3072, 20_000])
def test_the_width_that_the_refusal_names_leaves_a_channel(channels):
    with pytest.raises(JobError) as refusal:
        scale_width(channels, 0.9 / channels)
    assert scale_width(channels, float(re.search(r"at least ([\d.e-]+):", str(refusal.value)).group(1))) >= 1


def test_a_model_leads_from_the_trunk_to_the_common_size_and_to_the_classes():
    trunk = Trunk(nn.Identity(), (1, 2, 2), nn.Flatten(), 4)
    projected, own = Model(trunk, (1, 2, 2), 3, features=6), Model(trunk, (1, 2, 2), 3)
    assert (projected.feature_size, projected.projection.in_features, projected.head.in_features) == (6, 4, 6)
    assert (own.feature_size, own.head.in_features) == (4, 4) and isinstance(own.projection, nn.Identity)
    x = torch.tensor([[[[-1.0, 2.0], [3.0, -4.0]]]])
    assert own.features(x).tolist() == [[-1.0, 2.0, 3.0, -4.0]] and projected.features(x).min() >= 0


def test_a_width_is_rounded_down():
    assert [scale_width(10, width) for width in (1.0, 0.75, 0.39, 0.1)] == [10, 7, 3, 1]
