"""What kinds of generators share: settings that are refused by name, labels as inputs, and a kind that keeps every promise of GenerativeModel."""
from dataclasses import fields

import pytest
import torch

from hpcfl.errors import LayoutError
from hpcfl.generators.class_vtc import Vtc
from hpcfl.generators.cvae import Cvae
from hpcfl.generators.dcgan import Dcgan
from hpcfl.generators.ddpm import Ddpm
from hpcfl.generators.generative import GenerativeModel, Rule, check_model, is_power_of_two, one_hot, planes
from hpcfl.training.optimizers import Optimizer

KINDS = [Cvae((1, 8, 8)), Dcgan((1, 8, 8)), Ddpm((1, 8, 8), width=8), Vtc((1, 8, 8), latent=8)]


@pytest.mark.parametrize("model", KINDS, ids=lambda model: type(model).__name__)
def test_every_kind_has_a_generator_a_rule_for_each_loss_and_trains_what_it_has(model):
    promised = {*GenerativeModel.__annotations__, *(name for name in vars(GenerativeModel) if not name.startswith("_"))}
    assert {"shape", "sample", "rules"} <= promised and all(hasattr(model, name) for name in promised)
    with torch.device("meta"):
        networks = model.networks()
    trained = [name for names, _ in model.losses() for name in names]
    assert "generator" in networks and sorted(trained) == sorted(networks)
    assert len(model.rules()) == len(model.losses()) and model.calls >= 1 and model.decay in ("none", "linear")


def test_a_rule_is_read_by_the_optimizer_as_it_is():
    rule = Rule("adam", 1e-3, betas=(0.5, 0.999), weight_decay=1e-4)
    assert {field.name for field in fields(Rule)} <= {field.name for field in fields(Optimizer)}
    optimizer = Optimizer(**vars(rule))
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-3, (0.5, 0.999), 1e-4)


@pytest.mark.parametrize("shape, said", [((0, 8, 8), "wanted .C, H, H. with H even: resize the images"), ((1, 8, 6), "got data of .1, 8, 6."),
                                         ((1, 7, 7), "H even")])
def test_data_that_no_network_takes_are_refused_with_the_sides_that_would_do(shape, said):
    with pytest.raises(LayoutError, match=f"Vtc: .*{said}"):
        check_model(Vtc(shape, latent=1) if shape == (1, 7, 7) else stub(shape), lambda side: side % 2 == 0, "even", ("unit",))


def stub(shape):
    """A Vtc that was not checked."""
    model = object.__new__(Vtc)
    vars(model).update(shape=shape, classes=10, latent=1, blur=1.0, value_range="symmetric")
    return model


def test_a_range_and_a_number_out_of_bounds_are_refused():
    model = Vtc((1, 8, 8), latent=8)
    with pytest.raises(LayoutError, match="Vtc: value_range = 'symmetric' is not one it has; there are unit, features"):
        check_model(model, lambda side: True, "any", ("unit", "features"))
    with pytest.raises(LayoutError, match="Vtc: latent = 8 is too small; wanted at least 9"):
        check_model(model, lambda side: True, "any", ("symmetric",), latent=9)
    check_model(model, lambda side: True, "any", ("symmetric",), latent=8)


@pytest.mark.parametrize("side, least, wanted", [(8, 8, True), (64, 8, True), (4, 8, False), (12, 4, False), (1, 1, True)])
def test_a_side_is_a_power_of_two_from_the_least_on(side, least, wanted):
    assert is_power_of_two(side, least) is wanted


def test_labels_become_rows_of_zeros_and_a_one_and_planes_beside_maps():
    y, maps = torch.tensor([2, 0]), torch.zeros(2, 5, 3, 4, dtype=torch.float64)
    rows = one_hot(y, 3, maps)
    assert rows.tolist() == [[0, 0, 1], [1, 0, 0]] and rows.dtype == torch.float64
    filled = planes(rows, maps)
    assert filled.shape == (2, 3, 3, 4) and torch.equal(filled[:, :, 2, 1], rows) and torch.equal(filled[:, :, 0, 3], rows)
