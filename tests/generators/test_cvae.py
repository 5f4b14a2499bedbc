"""CVAE: sizes of GeFL's specification, its loss by hand, how labels enter, and clients trained together."""
import numpy as np
import pytest
import torch
from torch import nn

from hpcfl.errors import LayoutError
from hpcfl.generators.cvae import Cvae, negative_bound
from tests.support.generator_checks import (
    LABEL,
    batch,
    blank,
    check_draws,
    check_engines,
    check_gradients,
    check_samples,
    close,
    million_macs,
    networks,
    on_meta,
    parameters,
    scalars,
    stub,
)

MNIST = Cvae((1, 32, 32))
CIFAR = Cvae((3, 32, 32), latent=50)
FEATURES = Cvae((3, 16, 16), value_range="features")
CIFAR_FEATURES = Cvae((10, 16, 16), latent=50, value_range="features")
SMALL = [Cvae((1, 8, 8), 3, 2, 4), Cvae((2, 16, 16), 3, 2, 2, "features")]


@pytest.mark.parametrize("model, wanted", [(MNIST, 22_354_593), (CIFAR, 22_463_207), (FEATURES, 5_546_659), (CIFAR_FEATURES, 5_613_294)])
def test_parameters_are_those_of_the_specification(model, wanted):
    assert sum(parameters(model).values()) == wanted


@pytest.mark.parametrize("model, millions", [(MNIST, 22.360), (CIFAR, 22.469), (FEATURES, 5.549), (CIFAR_FEATURES, 5.616)])
def test_what_crosses_the_wire_is_that_of_the_specification(model, millions):
    assert round(scalars(model) / 1e6, 3) == millions


@pytest.mark.parametrize("model, encoder, decoder", [(MNIST, 34.1, 33.8), (CIFAR, 34.7, 34.4), (FEATURES, 6.6, 6.5), (CIFAR_FEATURES, 7.1, 7.0)])
def test_computation_is_that_of_the_specification(model, encoder, decoder):
    found = on_meta(model)
    assert million_macs(found["encoder"], blank(*model.shape), LABEL) == pytest.approx(encoder, abs=0.06)
    assert million_macs(found["generator"], blank(model.latent), LABEL) == pytest.approx(decoder, abs=0.06)


@pytest.mark.parametrize("shape, value_range, low", [((1, 8, 8), "unit", 0), ((3, 32, 32), "unit", 0), ((3, 64, 64), "unit", -1),
                                                     ((3, 32, 32), "symmetric", -1), ((3, 8, 8), "features", 0), ((10, 16, 16), "features", 0),
                                                     ((10, 32, 32), "features", 0), ((80, 2, 2), "features", 0)])
def test_samples_have_the_shape_and_range_of_the_data(shape, value_range, low):
    check_samples(Cvae(shape, 4, 3, 4, value_range), low)


@pytest.mark.parametrize("side, value_range, wanted", [(32, "unit", nn.ReLU), (64, "unit", nn.Tanh), (32, "symmetric", nn.Tanh),
                                                       (16, "features", nn.ReLU), (64, "features", nn.ReLU)])
def test_the_last_activation_follows_the_range_and_the_published_64_pixels(side, value_range, wanted):
    assert isinstance(on_meta(Cvae((3, side, side), value_range=value_range))["generator"].layers.output, wanted)


def test_the_encoder_ends_at_one_pixel_whose_channels_the_decoder_mirrors():
    assert (MNIST.widths, FEATURES.widths, Cvae((3, 64, 64)).widths[-1]) == ((64, 128, 256, 512, 1024), (64, 128, 256, 512), 2048)


def test_loss_is_the_sum_of_squares_and_the_divergence_from_the_standard_normal():
    drawn = np.random.default_rng(0)
    x, eps, mean, log_variance, weights = (drawn.normal(size=shape) for shape in ((4, 1, 2, 2), (4, 3), (4, 3), (4, 3), (3, 4)))
    y = np.array([1, 0, 2, 2])

    def encoder(given, labels):
        assert np.array_equal(given, x) and np.array_equal(labels, y)
        return torch.from_numpy(mean), torch.from_numpy(log_variance)

    def decoder(z, labels):
        return (z @ torch.from_numpy(weights)).view(4, 1, 2, 2) + labels.view(4, 1, 1, 1)
    z = mean + np.exp(log_variance / 2) * eps
    squares = ((z @ weights + y[:, None] - x.reshape(4, 4)) ** 2).sum()
    divergence = sum(0.5 * (np.exp(log) + mu ** 2 - 1 - log) for mu, log in zip(mean.ravel(), log_variance.ravel(), strict=True))
    data = {name: torch.from_numpy(value) for name, value in (("x", x), ("y", y), ("eps", eps))}
    loss, measured = negative_bound(stub(encoder=encoder, generator=decoder), data, {})
    assert close(loss, squares + divergence) and close(measured["reconstruction"], squares) and close(measured["kl"], divergence)


def test_the_encoder_reads_the_number_of_the_class_and_the_decoder_one_hot():
    model, seen = SMALL[0], []
    found, y = networks(model), torch.tensor([2, 1])
    for layer in (found["encoder"].layers.down1, found["generator"].start[0]):
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    x, z = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64)
    found["encoder"](x, y)
    found["generator"](z, y)
    assert torch.equal(seen[0], torch.cat([x, y.double().view(2, 1, 1, 1).expand(2, 1, 8, 8)], 1))
    assert torch.equal(seen[1], torch.cat([z, torch.eye(3, dtype=torch.float64)[y]], 1))


@pytest.mark.parametrize("model", SMALL, ids=["image", "features"])
def test_clients_together_get_the_gradients_that_each_gets_alone(model):
    check_gradients(model)


@pytest.mark.parametrize("model", SMALL, ids=["image", "features"])
def test_both_engines_train_alike(model):
    check_engines(model)


def test_draws_follow_the_generator():
    check_draws(SMALL[0])


def test_training_uses_adam_with_coupled_decay():
    assert [(rule.name, rule.lr, rule.betas, rule.weight_decay) for rule in MNIST.rules()] == [("adam", 1e-3, (0.9, 0.999), 1e-3)]


def test_it_learns_one_batch():
    model = SMALL[0]
    found, data = networks(model), batch(model, 8)
    optimizer = torch.optim.Adam([leaf for network in found.values() for leaf in network.parameters()], 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = negative_bound(stub(**found), data, {})[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("settings, said", [({"shape": (1, 28, 28)}, "power of two of at least 2"), ({"shape": (1, 1, 1)}, "power of two"),
                                            ({"shape": (1, 32, 32), "value_range": "maps"}, "unit, symmetric, features"),
                                            ({"shape": (1, 32, 32), "latent": 0}, "latent = 0 .* at least 1")])
def test_settings_that_no_network_has_are_refused(settings, said):
    with pytest.raises(LayoutError, match=said):
        Cvae(**settings)
