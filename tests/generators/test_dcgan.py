"""DCGAN: sizes of GeFL's specification, its losses by hand, labels as planes, initialisation, and clients trained together."""
import numpy as np
import pytest
import torch
from torch import nn

from hpcfl.errors import LayoutError
from hpcfl.generators.dcgan import Dcgan, discriminator_loss, generator_loss
from hpcfl.streams import Stream
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

MNIST = Dcgan((1, 32, 32))
CIFAR = Dcgan((3, 32, 32), width_g=256, width_d=64)
FEATURES = Dcgan((3, 16, 16), value_range="features")
CIFAR_FEATURES = Dcgan((10, 16, 16), width_g=256, width_d=64, value_range="features")
SMALL = [Dcgan((1, 8, 8), 3, 4, 4, 5), Dcgan((2, 16, 16), 3, 4, 4, 5, "features")]


@pytest.mark.parametrize("model, generator, discriminator", [(MNIST, 3_076_737, 2_643_329), (CIFAR, 11_404_547, 667_329)])
def test_parameters_of_images_are_those_of_the_specification(model, generator, discriminator):
    assert parameters(model) == {"generator": generator, "discriminator": discriminator}


@pytest.mark.parametrize("model, millions", [(MNIST, 5.723), (CIFAR, 12.076), (FEATURES, 5.205), (CIFAR_FEATURES, 10.048)])
def test_what_crosses_the_wire_is_that_of_the_specification_without_its_dead_layers(model, millions):
    assert round(scalars(model) / 1e6, 3) == millions


@pytest.mark.parametrize("model, generator, discriminator", [(MNIST, 68.1, 70.0), (CIFAR, 272.5, 18.5), (FEATURES, 34.8, 17.6),
                                                             (CIFAR_FEATURES, 140.4, 4.9)])
def test_computation_is_that_of_the_specification(model, generator, discriminator):
    found = on_meta(model)
    assert million_macs(found["generator"], blank(100), LABEL) == pytest.approx(generator, abs=0.06)
    assert million_macs(found["discriminator"], blank(*model.shape), LABEL) == pytest.approx(discriminator, abs=0.06)


@pytest.mark.parametrize("shape, value_range", [((1, 8, 8), "symmetric"), ((3, 32, 32), "symmetric"), ((3, 64, 64), "symmetric"),
                                                ((3, 8, 8), "features"), ((10, 16, 16), "features"), ((10, 32, 32), "features")])
def test_samples_have_the_shape_and_range_of_the_data(shape, value_range):
    samples = check_samples(Dcgan(shape, 4, 8, 8, 6, value_range), low=0 if value_range == "features" else -1)
    assert value_range == "features" or samples.max() <= 1


def test_a_larger_image_doubles_the_widest_end_of_both_networks():
    def widths(side, name, kind):
        return [layer.out_channels for layer in on_meta(Dcgan((3, side, side), 10, 8, 4))[name].layers if isinstance(layer, kind)]
    assert (widths(32, "generator", nn.ConvTranspose2d), widths(64, "generator", nn.ConvTranspose2d)) == ([16, 8, 3], [32, 16, 8, 3])
    assert (widths(32, "discriminator", nn.Conv2d), widths(64, "discriminator", nn.Conv2d)) == ([8, 16, 1], [8, 16, 32, 1])


def test_activations_are_those_of_images_and_of_features():
    def kinds(model, name):
        found = [layer for layer in on_meta(model)[name].modules() if isinstance(layer, nn.ReLU | nn.LeakyReLU | nn.Tanh)]
        assert all(layer.negative_slope == 0.2 for layer in found if isinstance(layer, nn.LeakyReLU))
        return [type(layer) for layer in found]
    assert kinds(MNIST, "generator") == [nn.ReLU] * 4 + [nn.Tanh]
    assert kinds(FEATURES, "generator") == [nn.LeakyReLU] * 3 + [nn.ReLU]
    assert kinds(MNIST, "discriminator") == kinds(FEATURES, "discriminator") == [nn.LeakyReLU] * 4


def test_weights_start_small_and_biases_at_zero():
    for network in networks(Dcgan((3, 32, 32), 10, 32, 32)).values():
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
        weights = torch.cat([layer.weight.flatten() for layer in layers])
        assert len(layers) == 5 and weights.std().item() == pytest.approx(0.02, rel=0.02) and abs(weights.mean().item()) < 5e-4
        assert not any(layer.bias.any() for layer in layers)
        assert all((norm.weight == 1).all() and not norm.bias.any() for norm in network.modules() if isinstance(norm, nn.BatchNorm2d))


def test_losses_are_binary_cross_entropies_of_sigmoids():
    data, logits = {"x": "real", "y": "y", "z1": 1, "y1": "y1", "z2": 2, "y2": "y2"}, np.linspace(-3, 4, 7)
    fakes = {1: torch.tensor(1.0), 2: torch.tensor(2.0)}
    scores = {("real", "y"): logits, (1, "y1"): logits - 1, (2, "y2"): 2 * logits}
    modules = stub(generator=lambda z, y: fakes[z], discriminator=lambda x, y: torch.from_numpy(scores[x if x == "real" else int(x), y]))

    def sigmoid(value):
        return 1 / (1 + np.exp(-value))
    wanted = -np.log(sigmoid(logits)).mean() - np.log(1 - sigmoid(logits - 1)).mean()
    assert close(discriminator_loss(modules, data, {})[0], wanted)
    assert close(generator_loss(modules, data, {})[0], -np.log(sigmoid(2 * logits)).mean())


def test_a_sure_discriminator_gives_finite_losses_and_slopes():
    sure = torch.tensor([-1e4, 1e4], requires_grad=True)
    modules = stub(generator=lambda z, y: z, discriminator=lambda x, y: sure * 1)
    data = dict.fromkeys(("x", "y", "z1", "y1", "z2", "y2"), torch.zeros(2))
    for loss, wanted, slopes in ((discriminator_loss, 1e4, [-0.5, 0.5]), (generator_loss, 5e3, [-0.5, 0.0])):
        value = loss(modules, data, {})[0]
        assert value.item() == wanted
        assert torch.autograd.grad(value, sure)[0].tolist() == slopes


def test_no_gradient_of_the_discriminators_step_reaches_the_generator():
    found, data = networks(SMALL[0]), batch(SMALL[0])
    discriminator_loss(stub(**found), data, {})[0].backward()
    assert all(leaf.grad is None for leaf in found["generator"].parameters())
    assert all(leaf.grad is not None for leaf in found["discriminator"].parameters())


def test_labels_enter_as_one_hot_maps():
    model, seen = SMALL[0], []
    found, y = networks(model), torch.tensor([2, 0])
    for network in found.values():
        network.label[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    found["generator"](torch.zeros(2, 5, dtype=torch.float64), y)
    found["discriminator"](torch.zeros(2, *model.shape, dtype=torch.float64), y)
    wanted = torch.eye(3, dtype=torch.float64)[y][:, :, None, None]
    assert torch.equal(seen[0], wanted) and torch.equal(seen[1], wanted.expand(2, 3, 8, 8))


def test_classes_of_generated_data_are_uniform_and_drawn_for_each_step():
    model = Dcgan((1, 8, 8), 5)
    drawn = model.noise({"x": torch.zeros(5000, 1, 8, 8), "y": torch.zeros(5000, dtype=torch.int64)}, Stream(0, "noise").torch())
    for name in ("y1", "y2"):
        assert np.abs(torch.bincount(drawn[name], minlength=5).numpy() - 1000).max() < 120
    assert not torch.equal(drawn["y1"], drawn["y2"]) and not torch.equal(drawn["z1"], drawn["z2"])
    assert drawn["z1"].std().item() == pytest.approx(1, rel=0.01)
    check_draws(model)


@pytest.mark.parametrize("model", SMALL, ids=["image", "features"])
def test_clients_together_get_the_gradients_that_each_gets_alone(model):
    check_gradients(model)


@pytest.mark.parametrize("model", SMALL, ids=["image", "features"])
def test_both_engines_train_alike(model):
    check_engines(model)


def test_both_networks_use_adam_with_a_short_memory():
    assert [(rule.name, rule.lr, rule.betas, rule.weight_decay) for rule in MNIST.rules()] == [("adam", 2e-4, (0.5, 0.999), 0.0)] * 2


@pytest.mark.parametrize("settings, said", [({"shape": (1, 28, 28)}, "power of two of at least 8"), ({"shape": (1, 4, 4)}, "power of two"),
                                            ({"shape": (1, 32, 16)}, r"\(C, H, H\)"),
                                            ({"shape": (1, 32, 32), "value_range": "unit"}, "symmetric, features"),
                                            ({"shape": (1, 32, 32), "width_d": 1}, "width_d = 1 .* at least 2")])
def test_settings_that_no_network_has_are_refused(settings, said):
    with pytest.raises(LayoutError, match=said):
        Dcgan(**settings)
