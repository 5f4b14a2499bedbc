"""The VTC: sizes of the specification, range, any image size, and a mismatch of p that is named."""
import pytest
import torch
from torch import nn

from hpcfl.errors import LayoutError
from hpcfl.generators.vtc import VTC, default_channels


@pytest.mark.parametrize("shape, wanted", [((1, 28, 28), 3_350_017), ((3, 32, 32), 2_760_579), ((3, 64, 64), 2_791_875)])
def test_parameters_at_512_latents_are_those_of_the_specification(shape, wanted):
    assert sum(parameter.numel() for parameter in VTC(512, shape).parameters()) == wanted


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 1, 1), (1, 30, 30), (3, 20, 48), (1, 36, 36)])
def test_images_have_the_asked_shape_and_lie_between_minus_one_and_one(shape):
    images = VTC(16, shape)(100 * torch.randn(3, 16))
    assert images.shape == (3, *shape)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("size, wanted", [(8, (128, 64)), (16, (128, 64)), (28, (128, 64)), (32, (256, 128, 64)), (64, (256, 128, 64, 32))])
def test_default_widths_follow_the_image(size, wanted):
    assert default_channels((1, size, size)) == wanted


def test_widths_are_a_setting():
    generator = VTC(8, (1, 32, 32), channels=(24, 12))
    assert generator.base == (24, 8, 8)
    assert generator(torch.zeros(2, 8)).shape == (2, 1, 32, 32)


def test_nothing_but_the_last_transposed_conv_has_a_bias_and_weights_start_small():
    ups = [layer for layer in VTC(512, (3, 32, 32)).modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.bias is not None for layer in ups] == [False, False, True]
    assert all(abs(layer.weight.std().item() - 0.02) < 0.002 for layer in ups)


def test_generator_has_no_running_statistics():
    assert not list(VTC(8, (1, 28, 28)).buffers())


def test_cropping_takes_the_middle():
    torch.manual_seed(0)
    whole, cropped = VTC(8, (1, 32, 32), (16, 8)), VTC(8, (1, 30, 30), (16, 8))
    cropped.load_state_dict(whole.state_dict())
    v = torch.randn(2, 8)
    assert torch.equal(cropped(v), whole(v)[:, :, 1:31, 1:31])


def test_another_output_takes_the_place_of_tanh():
    usual, other = VTC(8, (1, 30, 30), (16, 8)), VTC(8, (1, 30, 30), (16, 8), torch.relu)
    other.load_state_dict(usual.state_dict())
    v = torch.randn(2, 8)
    torch.testing.assert_close(torch.tanh(other(v)), usual(v).relu())


def test_latents_of_another_size_are_refused_by_name():
    with pytest.raises(LayoutError, match=r"latents of size 64, wanted 32.*models\.feature_size"):
        VTC(32, (1, 28, 28))(torch.zeros(2, 64))


@pytest.mark.parametrize("latent, shape, channels", [(0, (1, 28, 28), None), (8, (28, 28), None), (8, (1, 0, 28), None), (8, (1, 28, 28), ())])
def test_sizes_below_one_are_refused(latent, shape, channels):
    with pytest.raises(LayoutError, match="wanted numbers of at least 1"):
        VTC(latent, shape, channels)


def test_it_learns_to_decode_one_image():
    torch.manual_seed(0)
    generator, target, v = VTC(8, (1, 8, 8), (16, 8)), torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 8)
    optimizer = torch.optim.Adam(generator.parameters(), 1e-2)
    before = (generator(v) - target).square().mean().item()
    for _ in range(80):
        optimizer.zero_grad()
        (generator(v) - target).square().mean().backward()
        optimizer.step()
    assert (generator(v) - target).square().mean() < 0.2 * before
