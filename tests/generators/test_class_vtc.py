"""Class VTC: its loss and Gaussians by hand, which term trains what, clients trained together, and samples of digits that look like their class."""
import math

import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.data.embedded import load_digits
from hpcfl.data.shards import Scale, Shard, iterate_epochs
from hpcfl.errors import LayoutError
from hpcfl.generators.class_vtc import LEAST_DEVIATION, UNIT, Vtc
from hpcfl.models import fixed_maps
from hpcfl.streams import Stream
from hpcfl.training.evaluate import bind
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from tests.support.generator_checks import (
    batch,
    check_draws,
    check_engines,
    check_gradients,
    check_samples,
    close,
    networks,
    parameters,
    scalars,
    stub,
    trained_by,
)

SMALL = [Vtc((1, 8, 8), 3, 6), Vtc((2, 16, 16), 3, 6, value_range="features")]


class Scattered(Vtc):
    """A Vtc whose classes differ before any training."""

    def networks(self):
        found, generator = super().networks(), Stream(0, "classes").torch()
        for leaf in (found["generator"].mean, found["generator"].log_deviation):
            leaf.data = torch.randn(leaf.shape, generator=generator) / UNIT
        return found


@pytest.mark.parametrize("shape, latent, ups", [((1, 32, 32), 64, 524_288 + 131_072 + 1_025), ((3, 32, 32), 192, 524_288 + 131_072 + 3_075)])
def test_the_decoder_is_fedvtcs_and_each_class_adds_two_rows(shape, latent, ups):
    start, norms, rows = (latent + 1) * 256 * 4 * 4, 2 * (256 + 128 + 64), 2 * 10 * latent
    assert parameters(Vtc(shape, latent=latent)) == {"generator": start + norms + ups + rows}


def test_nothing_but_parameters_crosses_the_wire():
    assert scalars(SMALL[0]) == sum(parameters(SMALL[0]).values())


@pytest.mark.parametrize("shape, value_range, low", [((1, 8, 8), "symmetric", -1), ((3, 28, 28), "symmetric", -1), ((3, 32, 32), "symmetric", -1),
                                                     ((3, 16, 16), "features", 0), ((10, 16, 16), "features", 0)])
def test_samples_have_the_shape_and_range_of_the_data(shape, value_range, low):
    samples = check_samples(Scattered(shape, 4, 9, value_range=value_range), low)
    assert value_range == "features" or samples.max() <= 1


def test_a_batch_carries_the_cosine_coefficients_of_its_data():
    data = batch(SMALL[1], 5, dtype=torch.float32)
    assert torch.equal(data["z"], fixed_maps.build("dct", (2, 16, 16), 6)(data["x"])) and data["eps"].shape == (5, 6)


def test_loss_is_squared_error_and_likelihood_of_the_class_per_sample():
    drawn, y, model = np.random.default_rng(0), np.array([1, 0, 2, 2]), Vtc((1, 2, 2), 3, 3, blur=0.5)
    x, z, eps, mean, log_deviation, weights = (drawn.normal(size=shape) for shape in ((4, 1, 2, 2), (4, 3), (4, 3), (3, 3), (3, 3), (3, 4)))

    def gaussian(labels):
        return torch.from_numpy(mean[labels]), torch.from_numpy(np.exp(log_deviation[labels]))

    def decoder(v):
        return (v @ torch.from_numpy(weights)).view(4, 1, 2, 2)
    squares = (((z + 0.5 * np.exp(log_deviation[y]) * eps) @ weights - x.reshape(4, 4)) ** 2).sum() / 4
    surprise = sum(-math.log(math.exp(-0.5 * ((z[b, j] - mean[c, j]) / math.exp(log_deviation[c, j])) ** 2) / math.exp(log_deviation[c, j]))
                   for b, c in enumerate(y) for j in range(3)) / 4
    data = {name: torch.from_numpy(value) for name, value in (("x", x), ("y", y), ("z", z), ("eps", eps))}
    loss, measured = model.decoding_loss(stub(generator=stub(gaussian=gaussian, decoder=decoder)), data, {})
    assert close(loss, squares + surprise) and close(measured["reconstruction"], squares) and close(measured["surprise"], surprise)


def test_reconstruction_trains_the_decoder_and_the_likelihood_the_classes():
    model = Scattered((1, 8, 8), 3, 6)
    network, data = networks(model)["generator"], batch(model, 8)
    measured = model.decoding_loss(stub(generator=network), data, {})[1]
    names, leaves = zip(*network.named_parameters(), strict=True)
    for term, trains in (("reconstruction", lambda name: name.startswith("decoder.")), ("surprise", lambda name: not name.startswith("decoder."))):
        gradients = torch.autograd.grad(measured[term], leaves, allow_unused=True, retain_graph=True)
        assert [gradient is not None for gradient in gradients] == [trains(name) for name in names]


def test_the_likelihood_ends_at_the_mean_and_the_variance_of_each_class():
    model = SMALL[0]
    network, data = networks(model)["generator"], batch(model, 60)
    moments = [(z.mean(0), z.var(0, correction=0)) for z in (data["z"][data["y"] == label] for label in range(3))]
    mean, variance = (torch.stack(part) for part in zip(*moments, strict=True))
    with torch.no_grad():
        network.mean.copy_(mean / UNIT)
        network.log_deviation.copy_(0.5 * (variance - LEAST_DEVIATION ** 2).log() / UNIT)
    surprise = model.decoding_loss(stub(generator=network), data, {})[1]["surprise"]
    for gradient in torch.autograd.grad(surprise, (network.mean, network.log_deviation)):
        assert gradient.abs().max() < 1e-12 * UNIT


def test_a_deviation_never_falls_below_its_floor_and_keeps_finite_gradients():
    model = SMALL[0]
    network, data = networks(model)["generator"], batch(model, 8)
    network.log_deviation.data.fill_(-1e4)
    assert close(network.gaussian(torch.arange(3))[1], np.full((3, 6), LEAST_DEVIATION))
    loss = model.decoding_loss(stub(generator=network), data, {})[0]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, tuple(network.parameters())))


def test_a_sample_decodes_a_draw_of_its_class():
    network, y, generator = networks(Scattered((1, 8, 8), 3, 6))["generator"], torch.tensor([2, 0, 2]), Stream(0, "sample").torch()
    eps = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    v = UNIT * network.mean[y] + ((2 * UNIT * network.log_deviation[y]).exp() + LEAST_DEVIATION ** 2).sqrt() * eps
    torch.testing.assert_close(network(eps, y), network.decoder(v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", SMALL, ids=["image", "features"])
def test_clients_together_get_the_gradients_that_each_gets_alone(model):
    check_gradients(model)


@pytest.mark.parametrize("model", SMALL, ids=["image", "features"])
def test_both_engines_train_alike(model):
    check_engines(model)


@pytest.mark.parametrize("model", SMALL, ids=["image", "features"])
def test_draws_follow_the_generator(model):
    check_draws(model)


def test_training_uses_fedvtcs_adam():
    assert [(rule.name, rule.lr, rule.betas, rule.weight_decay) for rule in SMALL[0].rules()] == [("adam", 1e-3, (0.5, 0.999), 0.0)]


def test_samples_of_digits_are_nearest_to_the_mean_image_of_their_class():
    model, data, noise = Vtc((1, 8, 8)), load_digits(), Stream(0, "noise").torch()
    shard = Shard(torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels), Scale("symmetric"))
    modules = networks(model, dtype=torch.float32)
    group = Group.from_states("none", {0: tree.join(generator=modules["generator"].state_dict())})
    group, _ = fit(group, modules, trained_by(model), lambda client: (model.noise(drawn, noise) for drawn in iterate_epochs(shard, 64, 12, Stream(0, "order"))))
    y, images = torch.arange(10).repeat_interleave(20), shard.pixels()
    samples = model.sample(bind(modules["generator"], tree.row(group.part("generator"), 0)), y, Stream(0, "sample").torch())
    means = torch.stack([images[shard.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(samples.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == y).double().mean() > 0.9
    within = torch.stack([samples[y == label].var(0).sum() for label in range(10)])
    assert within.min() > 1                                        # not one image for each class


@pytest.mark.parametrize("settings, said", [({"shape": (1, 28, 20)}, r"wanted \(C, H, H\)"), ({"value_range": "unit"}, "symmetric, features"),
                                            ({"latent": 0}, "latent = 0 .* at least 1"), ({"blur": -1.0}, "blur = -1.0 is too small"),
                                            ({"shape": (1, 4, 4), "latent": 17}, r"latent = 17 is too large; data of \(1, 4, 4\) have 16")])
def test_settings_that_no_network_has_are_refused(settings, said):
    with pytest.raises(LayoutError, match=said):
        Vtc(**{"shape": (1, 32, 32), **settings})
