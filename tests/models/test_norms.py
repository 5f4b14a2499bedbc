"""Norms: groups that divide the channels, and no running statistics where these must not be averaged."""
import pytest
import torch
from torch import nn

from hpcfl.models import zoo
from hpcfl.models.norms import NORMS, choose_groups, group_norm

GREY = (1, 32, 32)
SMALL = ("cnn1", "cnn8_bn", "fedconv", "mlp3", "resnet8", "vit")


@pytest.mark.parametrize("channels, wanted", [(3, 1), (10, 2), (16, 4), (20, 5), (100, 5), (32, 8), (512, 8), (1, 1)])
def test_groups_divide_the_channels_and_hold_at_least_four(channels, wanted):
    assert group_norm(channels).num_groups == wanted


@pytest.mark.parametrize("name", SMALL)
def test_group_norm_leaves_no_running_statistics(name):
    assert not list(zoo.build(name, GREY, 10, norm="group").buffers())


@pytest.mark.parametrize("channels", range(1, 130))
def test_no_larger_number_of_groups_would_do(channels):
    chosen = choose_groups(channels)
    assert channels % chosen == 0 and not any(channels % more == 0 and channels // more >= 4 for more in range(chosen + 1, 9))


def test_norms_by_name_normalise_maps():
    x = 5 + 3 * torch.randn(16, 8, 4, 4)
    for name, kind in (("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)):
        norm = NORMS[name](8)
        assert isinstance(norm, kind) and abs(float(norm(x).detach().mean())) < 1e-5 and float(norm(x).detach().std()) == pytest.approx(1.0, abs=1e-2)
