"""Common maps: the size that was asked for, the same bits everywhere, smooth enough to train through, and classes close to Gaussians."""
import gzip
import math
import os
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from hpcfl.errors import JobError, LayoutError
from hpcfl.models import fixed_maps

KINDS = tuple(fixed_maps.MAPS)


def images(shape, count=6, seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, size", [((1, 8, 8), 1), ((1, 8, 8), 64), ((1, 28, 28), 37), ((3, 32, 32), 178), ((3, 20, 24), 100),
                                         ((2, 9, 9), 50), ((1, 1, 1), 1)])
def test_features_have_exactly_the_asked_size(kind, shape, size):
    built = fixed_maps.build(kind, shape, size)
    assert built.size == size
    assert built(images(shape)).shape == (6, size)


@pytest.mark.parametrize("kind", KINDS)
def test_map_has_nothing_to_train_and_nothing_to_save(kind):
    built = fixed_maps.build(kind, (3, 16, 16), 40)
    assert not list(built.parameters()) and not built.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_bits_whatever_was_drawn_before(kind):
    one = fixed_maps.build(kind, (3, 16, 16), 60, 5)
    before = torch.get_rng_state()
    torch.rand(7)
    after = torch.get_rng_state()
    other = fixed_maps.build(kind, (3, 16, 16), 60, 5)
    assert torch.equal(one(images((3, 16, 16))), other(images((3, 16, 16))))
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(before, after)


def test_only_random_filters_depend_on_the_seed():
    x = images((1, 28, 28))
    same = {kind: torch.equal(fixed_maps.build(kind, (1, 28, 28), 60, 1)(x), fixed_maps.build(kind, (1, 28, 28), 60, 2)(x)) for kind in KINDS}
    assert same == {"dct": True, "scattering": True, "random_conv": False}


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_an_image_do_not_depend_on_its_batch(kind):
    built, x = fixed_maps.build(kind, (3, 32, 32), 120), images((3, 32, 32), 5)
    torch.testing.assert_close(built(x)[2:3], built(x[2:3]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [torch.zeros(2, 1, 28, 28), -torch.ones(2, 1, 28, 28), images((1, 28, 28), 2)])
def test_gradients_are_finite_even_on_flat_images(kind, x):
    x = x.clone().requires_grad_()
    fixed_maps.build(kind, (1, 28, 28), 120)(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
def test_all_cosines_are_an_orthogonal_transform(shape):
    x = images(shape)
    z = fixed_maps.build("dct", shape, math.prod(shape))(x)
    scale = fixed_maps.COSINE_SCALE / math.sqrt(shape[1] * shape[2])
    torch.testing.assert_close(z @ z.T, x.flatten(1) @ x.flatten(1).T * scale**2, rtol=1e-4, atol=1e-2)


def test_squares_of_cosines_are_the_low_frequency_block():
    built = fixed_maps.build("dct", (1, 28, 28), 36)
    wanted = {6 * row + column for row in range(6) for column in range(6)}
    assert set(built.chosen.tolist()) == wanted


def test_first_cosine_is_the_mean_brightness():
    x = images((3, 16, 16))
    z = fixed_maps.build("dct", (3, 16, 16), 20)(x)
    torch.testing.assert_close(z[:, 0], fixed_maps.COSINE_SCALE * math.sqrt(3) * x.mean((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_colour_gets_fewer_cosines_than_brightness():
    built = fixed_maps.build("dct", (3, 32, 32), 96)
    channel = built.chosen // (len(built.rows) * len(built.columns))
    assert [int((channel == index).sum()) for index in range(3)] == [64, 16, 16]


def test_orientations_answer_to_the_direction_of_an_edge():
    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16)
    for turns, picture in enumerate((ramp, ramp.mT, -ramp, -ramp.mT)):
        responses = fixed_maps.Orientations(1)(picture)[0, :, 4:-4, 4:-4].mean((1, 2))
        assert int(responses.argmax()) == 2 * turns
        assert responses[(2 * turns + 4) % 8] == 0


@pytest.mark.parametrize("bank", [fixed_maps.Orientations(3), fixed_maps.RandomFilters(3, 0)])
def test_rotation_of_roots_is_orthonormal(bank):
    rows = fixed_maps.Roots(bank, (3, 16, 16), 90).rotation / fixed_maps.ROOT_SCALE
    torch.testing.assert_close(rows @ rows.T, torch.eye(90), rtol=0, atol=1e-5)


def test_windows_average():
    for pixels, windows in ((28, 6), (8, 6), (6, 6), (1, 1)):
        torch.testing.assert_close(fixed_maps.build_windows(pixels, windows).sum(1), torch.ones(windows).double())


def accuracy_of_class_gaussians(train, labels, test, wanted, shrink=0.1):
    scores = []
    for label in range(10):
        z = train[labels == label].double()
        covariance = torch.cov(z.T, correction=0)
        covariance = (1 - shrink) * covariance + shrink * covariance.trace() / z.shape[1] * torch.eye(z.shape[1])
        normal = torch.distributions.MultivariateNormal(z.mean(0), covariance)
        scores.append(normal.log_prob(test.double()))
    return (torch.stack(scores).argmax(0) == wanted).double().mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_gaussians_of_the_features_tell_digits_apart(kind):
    digits = load_digits()
    x, y = torch.tensor(digits.images[:, None] / 8 - 1).float(), torch.tensor(digits.target)
    z = fixed_maps.build(kind, (1, 8, 8), 40)(x)
    assert accuracy_of_class_gaussians(z[:1400], y[:1400], z[1400:], y[1400:]) > 0.92


def test_scattering_makes_classes_of_mnist_more_gaussian_than_cosines():
    folder = Path(os.environ.get("HPCFL_TEST_DATA", Path(__file__).parents[3] / "shared/data")) / "MNIST/raw"
    if not folder.is_dir():
        pytest.skip(f"no MNIST at {folder}; set HPCFL_TEST_DATA to a folder that holds MNIST/raw")
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as pixels, gzip.open(folder / "train-labels-idx1-ubyte.gz") as labels:
        x = torch.frombuffer(bytearray(pixels.read(16 + 4000 * 784)[16:]), dtype=torch.uint8).view(-1, 1, 28, 28) / 127.5 - 1
        y = torch.frombuffer(bytearray(labels.read(8 + 4000)[8:]), dtype=torch.uint8).long()
    accuracy = {}
    for kind in ("dct", "scattering"):
        built = fixed_maps.build(kind, (1, 28, 28), 64)
        z = torch.cat([built(part) for part in x.split(500)])
        accuracy[kind] = accuracy_of_class_gaussians(z[:3000], y[:3000], z[3000:], y[3000:], 0.01)
    assert accuracy["scattering"] > accuracy["dct"] + 0.01 and accuracy["scattering"] > 0.94


def test_unknown_kind_names_what_there_is():
    with pytest.raises(JobError, match="'fourier' is not known; wanted one of dct, random_conv, scattering"):
        fixed_maps.build("fourier", (1, 28, 28), 64)


@pytest.mark.parametrize("kind, shape, largest", [("dct", (1, 8, 8), 64), ("dct", (3, 8, 8), 192), ("scattering", (1, 8, 8), 512)])
def test_a_size_beyond_the_image_names_the_largest(kind, shape, largest):
    fixed_maps.build(kind, shape, largest)
    for size in (0, largest + 1):
        with pytest.raises(JobError, match=f"got {size} features, wanted 1 to {largest}"):
            fixed_maps.build(kind, shape, size)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_another_shape_are_refused_by_name(kind):
    with pytest.raises(LayoutError, match=r"\(1, 28, 28\) got \(2, 1, 32, 32\)"):
        fixed_maps.build(kind, (1, 28, 28), 64)(torch.zeros(2, 1, 32, 32))
