"""Turns: the modules of a loss, and errors that say what a loss gave and what was wanted."""
import pytest
import torch
from torch import nn

from hpcfl.errors import LayoutError
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.turns import Modules, Turn, describe_value
from tests.support.small_nets import ENGINES, SGD, Net, batches, cross_entropy, net_group


def answering(answer):
    """A loss that gives answer(cross-entropy) for it."""
    def loss(modules, batch, context):
        return answer(cross_entropy(modules, batch, context))
    return loss


ODD = {"a number": (lambda value: 3.0, r"returned 3.0 \(float\); wanted a floating-point tensor"),
       "nothing": (lambda value: None, r"returned None \(NoneType\); wanted a floating-point tensor"),
       "a whole number": (lambda value: value.long(), r"returned a tensor \(\) of int64; wanted a floating-point tensor"),
       "a loss for each image": (lambda value: value.expand(5), r"returned shape \(5,\); wanted a scalar"),
       "three things": (lambda value: (value, {}, {}), "returned a tuple of Tensor, dict, dict; wanted a floating-point tensor"),
       "a loss and a loss": (lambda value: (value, value), r"returned a tensor \(\) of float32 beside its value; wanted a dict"),
       "a measured number": (lambda value: (value, {"share": 0.5}), r"measured 'share' as 0.5 \(float\); wanted a tensor of shape \(\)"),
       "a measured vector": (lambda value: (value, {"share": value.expand(2)}), r"measured 'share' as a tensor \(2,\) of float32; wanted a tensor of"),
       "what does not depend on it": (lambda value: value.detach(), "does not depend on any parameter that its Turn trains, of model")}


@pytest.mark.parametrize("answer, wanted", ODD.values(), ids=ODD)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_gives_something_odd_is_told_so(engine, answer, wanted):
    group, turns = Group("net", (3, 4), net_group(2).state), [Turn(("model",), answering(answer), SGD)]
    with pytest.raises(LayoutError, match=rf"round 7: the loss answering.<locals>.loss of client 3(, 4)? {wanted}"):
        fit(group, {"model": Net()}, turns, lambda client: batches([5, 5])(0), engine=engine, where="round 7")


def test_a_loss_for_each_class_of_each_image_is_told_to_take_a_mean():
    turn = Turn(("model",), lambda modules, batch, context: modules.model(batch["x"]), SGD)
    with pytest.raises(LayoutError, match=r"<lambda> of client 0 returned shape \(5, 3\); wanted a scalar: take its mean or sum over the batch"):
        fit(net_group(2), {"model": Net()}, [turn], batches([5, 5]))


def test_the_modules_of_a_loss_are_its_attributes_and_measurements_come_beside_the_loss():
    modules = Modules({"model": Net(), "judge": nn.Linear(3, 1)})
    batch = next(iter(batches([5])(0)))

    def judged(own, read, context):
        score = own.judge(own.model(read["x"])).mean()
        return score * context["weight"], {"score": score}
    loss, scalars = modules(judged, batch, {"weight": torch.tensor(2.0)})
    assert loss.shape == () and torch.equal(loss, 2 * scalars["score"])
    assert modules(cross_entropy, batch, {})[1] == {}


def test_errors_call_a_loss_by_its_name():
    class Judging:
        def __call__(self, modules, batch, context):
            return None
    assert Turn(("model",), cross_entropy, SGD).loss_name == "cross_entropy"
    assert Turn(("model",), Judging(), SGD).loss_name == "Judging"


@pytest.mark.parametrize("given, text", [(torch.zeros(2, 3), "a tensor (2, 3) of float32"), ({"x": 1, "y": []}, "a dict of x: int, y: list"),
                                         ([1, "a"], "a list of int, str"), (None, "None (NoneType)"), ("w" * 100, "'" + 59 * "w" + " (str)")])
def test_what_was_given_is_described_in_a_few_words(given, text):
    assert describe_value(given) == text
