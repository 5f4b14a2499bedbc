"""Learned averaging: means by hand, fixed points, granularities, and gradients."""
import pytest
import torch
import torch.nn.functional as F

from hpcfl.models import zoo
from hpcfl.resize.averaged import GRANULARITIES, Averaged
from hpcfl.tree import Tree, select_floating

SHAPE, SAMPLES = (1, 8, 8), [30.0, 10.0, 60.0]


def models(count: int = 3, name: str = "cnn5_bn") -> list[Tree]:
    torch.manual_seed(1)
    return [{path: torch.rand(leaf.shape) if leaf.is_floating_point() else leaf for path, leaf in zoo.build(name, SHAPE, 10, 0).state_dict().items()}
            for _ in range(count)]


def averaged(given: list[Tree], samples: list[float], granularity: str = "element", normalised: bool = True, logits: torch.Tensor | None = None) -> Averaged:
    module = Averaged(zoo.build("cnn5_bn", SHAPE, 10, 0), len(given), granularity, normalised)
    state = dict(module.state_dict()) | module.derive_state(given, samples)
    module.load_state_dict(state | ({} if logits is None else {"logits": logits}))
    return module


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equal_logits_give_the_mean_weighted_by_samples(granularity):
    given = models()
    weights = averaged(given, SAMPLES, granularity).weights()
    assert weights.keys() == given[0].keys()
    for path in select_floating(given[0]):
        want = sum(count / 100 * model[path].double() for count, model in zip(SAMPLES, given, strict=True))
        torch.testing.assert_close(weights[path].double(), want, rtol=1e-5, atol=1e-6)
    plain = averaged(given, [1.0] * 3, granularity).weights()
    torch.testing.assert_close(plain["head.weight"], torch.stack([model["head.weight"] for model in given]).mean(0))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_identical_models_are_a_fixed_point_whatever_the_weights(granularity):
    given = models(1) * 4
    module = averaged(given, [5.0] * 4, granularity, logits=torch.randn_like(Averaged(zoo.build("cnn5_bn", SHAPE, 10, 0), 4, granularity).logits))
    for path, leaf in module.weights().items():
        torch.testing.assert_close(leaf, given[0][path] if leaf.is_floating_point() else torch.zeros_like(leaf), rtol=1e-5, atol=1e-6)


def test_a_weight_belongs_to_its_own_client_and_element():
    given = models(2)
    module = averaged(given, [1.0, 1.0], normalised=False)
    with torch.no_grad():
        module.logits.zero_()
    before = {path: leaf.clone() for path, leaf in module.weights().items()}
    assert not any(leaf.any() for path, leaf in before.items() if "norm" not in path and leaf.is_floating_point())
    with torch.no_grad():
        module.logits[1, 0] = 2.0                                  # the first element of the first parameter, of the second client
    first = next(iter(module.shapes))
    made = module.weights()[first].detach()
    assert float(made.flatten()[0]) == pytest.approx(float(given[1][first].flatten()[0])) and int((made != 0).sum()) == 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_channels_and_layers_share_a_weight(granularity):
    given = models(2)
    module = Averaged(zoo.build("cnn5_bn", SHAPE, 10, 0), 2, granularity)
    wanted = {"element": sum(parameter.numel() for parameter in zoo.build("cnn5_bn", SHAPE, 10, 0).parameters()),
              "channel": sum(shape[0] for shape in module.shapes.values()), "layer": len(module.shapes)}[granularity]
    assert module.logits.shape == (2, wanted)
    module = averaged(given, [1.0, 1.0], granularity, logits=torch.randn(2, wanted))
    one, other = (model["head.weight"] + torch.tensor([[2.0 * number]]) for number, model in enumerate(given))              # far apart: divided by
    module = averaged([model | {"head.weight": weight} for model, weight in zip(given, (one, other), strict=True)], [1.0, 1.0], granularity,
                      logits=module.logits.detach() + torch.randn(2, wanted))
    a = (2 * module.weights()["head.weight"].detach() - 2 * one) / (other - one)                       # a_2 of each element, for a_1 + a_2 = 2
    spread = {"element": a.std(), "channel": a.std(1).max(), "layer": a.std()}[granularity]
    assert (float(spread) < 1e-4) == (granularity != "element")


def test_gradients_reach_every_weight_and_the_models_stay():
    module = averaged(models(), SAMPLES)
    before = module.shares.clone()
    F.cross_entropy(module(torch.randn(8, *SHAPE)), torch.arange(8)).backward()
    gradient = module.logits.grad
    pieces = gradient.split([torch.Size(shape).numel() for shape in module.shapes.values()], dim=1)
    assert bool(torch.isfinite(gradient).all()) and all(bool(client.any()) for piece in pieces for client in piece)
    assert torch.equal(before, module.shares) and module.shares.grad is None
