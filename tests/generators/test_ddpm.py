"""DDPM: sizes of GeFL's specification, schedule, noising, ancestral and DDIM steps and guidance by hand, and clients trained together."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hpcfl.errors import LayoutError
from hpcfl.generators.ddpm import Ddpm, betas, kept_signal
from hpcfl.streams import Stream
from tests.support.generator_checks import (
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

MNIST = Ddpm((1, 32, 32))
CIFAR = Ddpm((3, 32, 32), steps=400)
FEATURES = Ddpm((3, 16, 16), value_range="features")
CIFAR_FEATURES = Ddpm((10, 16, 16), steps=500, value_range="features")
SMALL = [Ddpm((1, 8, 8), 3, 10, 8), Ddpm((2, 16, 16), 3, 10, 8, value_range="features")]


def schedule(steps):
    """beta_t and abar_t by the definition, one number after the other."""
    beta = [1e-4 + (0.02 - 1e-4) * t / steps for t in range(steps + 1)]
    signal, left = [], 1.0
    for value in beta:
        left *= 1 - value
        signal.append(left)
    return beta, signal


@pytest.mark.parametrize("model, wanted", [(MNIST, 7_568_641), (CIFAR, 7_573_251), (FEATURES, 4_427_523), (CIFAR_FEATURES, 4_443_658)])
def test_parameters_are_those_of_the_specification(model, wanted):
    assert parameters(model) == {"generator": wanted}


@pytest.mark.parametrize("model, millions", [(MNIST, 7.573), (CIFAR, 7.577), (FEATURES, 4.432), (CIFAR_FEATURES, 4.448)])
def test_what_crosses_the_wire_is_that_of_the_specification_without_the_schedule(model, millions):
    assert round(scalars(model) / 1e6, 3) == millions


@pytest.mark.parametrize("model, wanted", [(MNIST, 1793), (CIFAR, 1798), (FEATURES, 450), (CIFAR_FEATURES, 454)])
def test_computation_is_that_of_the_specification(model, wanted):
    assert million_macs(on_meta(model)["generator"], blank(*model.shape), blank(), blank(10)) == pytest.approx(wanted, abs=0.6)


@pytest.mark.parametrize("shape, value_range", [((1, 4, 4), "unit"), ((1, 28, 28), "unit"), ((3, 32, 32), "symmetric"), ((10, 16, 16), "features")])
@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0}, {"ddim_steps": 2, "eta": 1.0}], ids=["ancestral", "guided", "ddim"])
def test_samples_have_the_shape_of_the_data(shape, value_range, settings):
    check_samples(Ddpm(shape, 4, 3, 8, value_range=value_range, **settings))


def test_64_pixels_have_twice_the_pool_of_32():
    network = on_meta(Ddpm((3, 64, 64), width=8))["generator"]
    assert (network.mean[0].kernel_size, network.up0[0].kernel_size) == (16, (16, 16))


def test_group_norms_have_eight_groups_but_four_after_the_pool_of_small_maps():
    for model, wanted in ((MNIST, [8, 8]), (FEATURES, [4, 8])):
        assert [layer.num_groups for layer in on_meta(model)["generator"].modules() if isinstance(layer, nn.GroupNorm)] == wanted


@pytest.mark.parametrize("channels", [1, 8])
def test_the_residual_adds_the_input_or_the_first_conv_where_channels_differ(channels):
    block = networks(Ddpm((channels, 8, 8), width=8))["generator"].begin
    x = torch.randn(2, channels, 8, 8, dtype=torch.float64, generator=Stream(0, "x").torch())
    first = block.first(x)
    torch.testing.assert_close(block(x), ((first if channels == 1 else x) + block.second(first)) / 1.414)


@pytest.mark.parametrize("steps", [1, 10, 400])
def test_schedule_is_linear_and_its_product_begins_at_index_zero(steps):
    beta, signal = schedule(steps)
    assert close(betas(steps), beta) and close(kept_signal(steps), signal)


def test_training_mixes_data_and_noise_by_the_schedule_and_asks_for_the_noise():
    model, seen = Ddpm((1, 4, 4), 3, 10, drop=0.5), []
    generator = Stream(0, "data").torch()
    data = model.noise({"x": torch.rand(32, 1, 4, 4, dtype=torch.float64, generator=generator), "y": torch.arange(32) % 3}, generator)

    def network(*inputs):
        seen.extend(inputs)
        return inputs[0] * 0.5
    loss = model.denoising(stub(generator=network), data, {})[0]
    x, eps, t, signal = data["x"].numpy(), data["eps"].numpy(), data["t"].tolist(), np.array(schedule(10)[1])
    x_t = np.stack([math.sqrt(signal[s]) * a + math.sqrt(1 - signal[s]) * e for s, a, e in zip(t, x, eps, strict=True)])
    assert close(seen[0], x_t) and close(seen[1], np.array(t) / 10)
    assert close(loss, ((0.5 * x_t - eps) ** 2).mean())
    assert torch.equal(seen[2], torch.eye(3, dtype=torch.float64)[data["y"]] * data["kept"][:, None])
    assert 0 < data["kept"].sum() < 32


def test_times_reach_from_one_to_the_last_and_a_tenth_of_the_classes_is_hidden():
    model = Ddpm((1, 4, 4), steps=7)
    drawn = model.noise({"x": torch.zeros(7000, 1, 4, 4), "y": torch.zeros(7000, dtype=torch.int64)}, Stream(0, "noise").torch())
    counts = torch.bincount(drawn["t"], minlength=9)
    assert counts[0] == counts[8] == 0 and (counts[1:8] - 1000).abs().max() < 120
    assert drawn["kept"].double().mean().item() == pytest.approx(0.9, abs=0.02)
    check_draws(model)


def test_an_ancestral_step_is_that_of_the_paper():
    model, drawn = Ddpm((1, 4, 4), steps=10), np.random.default_rng(0)
    x, eps = drawn.normal(size=(2, 2, 1, 4, 4))
    beta, signal = schedule(10)
    for t in (1, 6, 10):
        mean, deviation = model.step_ancestral(torch.from_numpy(x), torch.from_numpy(eps), t)
        assert close(mean, (x - beta[t] / math.sqrt(1 - signal[t]) * eps) / math.sqrt(1 - beta[t]))
        assert deviation == pytest.approx(math.sqrt(beta[t]), rel=1e-12)


def test_ancestral_samples_have_the_variance_of_its_recursion():
    model = Ddpm((1, 40, 40), steps=10)
    variance, (beta, signal) = 1.0, schedule(10)
    for t in range(10, 0, -1):
        factor = (1 - 0.5 * beta[t] / math.sqrt(1 - signal[t])) / math.sqrt(1 - beta[t])
        variance = factor ** 2 * variance + (beta[t] if t > 1 else 0.0)                    # the last step adds no noise
    samples = model.sample(lambda x, time, known: 0.5 * x, torch.zeros(20, dtype=torch.int64), Stream(0, "sample").torch())
    assert samples.var().item() == pytest.approx(variance, rel=0.03)


def test_the_last_ancestral_step_adds_no_noise():
    model = Ddpm((1, 4, 4), steps=1)
    start = torch.randn(3, 1, 4, 4, generator=Stream(0, "sample").torch())
    samples = model.sample(lambda x, time, known: 0.5 * x, torch.zeros(3, dtype=torch.int64), Stream(0, "sample").torch())
    assert torch.equal(samples, model.step_ancestral(start, 0.5 * start, 1)[0])


def test_ddim_with_all_steps_and_full_noise_has_the_ancestral_mean_and_the_posterior_variance():
    model, drawn = Ddpm((1, 4, 4), steps=10, ddim_steps=10, eta=1.0), np.random.default_rng(0)
    x, eps = torch.from_numpy(drawn.normal(size=(2, 2, 1, 4, 4)))
    beta, signal = schedule(10)
    assert model.list_times() == list(range(10, 0, -1))
    for t in range(10, 1, -1):
        mean, deviation = model.step_ddim(x, eps, t, t - 1)
        assert close(mean, model.step_ancestral(x, eps, t)[0].numpy())
        assert deviation ** 2 == pytest.approx(beta[t] * (1 - signal[t - 1]) / (1 - signal[t]), rel=1e-9)


def test_ddim_without_noise_keeps_data_and_noise_and_changes_their_shares():
    model, (_, signal) = Ddpm((1, 4, 4), steps=10, ddim_steps=2), schedule(10)
    x, eps = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 2, 1, 4, 4)))
    noisy = math.sqrt(signal[10]) * x + math.sqrt(1 - signal[10]) * eps
    mean, deviation = model.step_ddim(noisy, eps, 10, 5)
    assert deviation == 0 and close(mean, (math.sqrt(signal[5]) * x + math.sqrt(1 - signal[5]) * eps).numpy())
    assert close(model.step_ddim(noisy, eps, 10, 0)[0], x.numpy())


@pytest.mark.parametrize("count, eta", [(1, 0.0), (3, 0.0), (3, 1.0), (10, 0.5)])
def test_ddim_with_a_network_that_knows_the_data_ends_at_the_data(count, eta):
    model, calls = Ddpm((1, 4, 4), 3, steps=10, ddim_steps=count, eta=eta), []
    signal = schedule(10)[1]

    def knowing(x, time, known):
        calls.append(round(time[0].item() * 10))
        kept = signal[calls[-1]]
        return (x - math.sqrt(kept) * known.argmax(1).view(-1, 1, 1, 1)) / math.sqrt(1 - kept)
    y = torch.tensor([2, 0, 1])
    samples = model.sample(knowing, y, Stream(0, "sample").torch())
    torch.testing.assert_close(samples, y.float().view(3, 1, 1, 1).expand(3, 1, 4, 4), rtol=0, atol=1e-4)
    assert calls == model.list_times() and len(calls) == count and calls[0] == 10


def test_guidance_pushes_away_from_what_the_network_says_without_a_class():
    asked = []

    def network(x, time, known):
        asked.append(len(x))
        return x * time.view(-1, 1, 1, 1) + (known @ torch.tensor([1.0, 3.0, 5.0], dtype=x.dtype)).view(-1, 1, 1, 1)
    x, y = torch.rand(2, 1, 4, 4, dtype=torch.float64), torch.tensor([2, 1])
    for w in (0.0, 2.0):
        got = Ddpm((1, 4, 4), 3, 10, guidance=w).estimate_noise(network, x, 4, y)
        with_class, without = 0.4 * x + torch.tensor([5.0, 3.0], dtype=x.dtype).view(2, 1, 1, 1), 0.4 * x
        assert close(got, ((1 + w) * with_class - w * without).numpy())
    assert asked == [2, 4]


def test_training_does_not_depend_on_how_samples_are_drawn():
    guided = replace(SMALL[0], guidance=2.0, ddim_steps=3, eta=0.5)
    assert all(torch.equal(one, other) for one, other in
               zip(networks(SMALL[0])["generator"].state_dict().values(), networks(guided)["generator"].state_dict().values(), strict=True))


def test_the_network_reads_time_and_class():
    network = networks(SMALL[0])["generator"].eval()
    x, time, known = torch.rand(1, 1, 8, 8, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64), torch.eye(3, dtype=torch.float64)[:1]
    answers = [network(x, time, known), network(x, time * 2, known), network(x, time, known * 0), network(x, time, known.roll(1, 1))]
    assert all(not torch.equal(one, other) for index, one in enumerate(answers) for other in answers[:index])


@pytest.mark.parametrize("model", SMALL, ids=["image", "features"])
def test_clients_together_get_the_gradients_that_each_gets_alone(model):
    check_gradients(model)


@pytest.mark.parametrize("model", SMALL, ids=["image", "features"])
def test_both_engines_train_alike(model):
    check_engines(model)


def test_training_uses_adam_whose_rate_decays_over_the_rounds():
    assert [(rule.name, rule.lr, rule.betas, rule.weight_decay) for rule in MNIST.rules()] == [("adam", 1e-4, (0.9, 0.999), 0.0)]
    assert MNIST.decay == "linear"


@pytest.mark.parametrize("settings, said", [({"shape": (1, 30, 30)}, "multiple of 4"), ({"width": 12}, "width 12, .* multiple of 8"),
                                            ({"drop": 1.5}, "drop 1.5"), ({"ddim_steps": 200}, "at most steps = 100"),
                                            ({"guidance": -1.0}, "guidance = -1.0 is too small")])
def test_settings_that_no_network_has_are_refused(settings, said):
    with pytest.raises(LayoutError, match=said):
        Ddpm(**{"shape": (1, 32, 32), **settings})
