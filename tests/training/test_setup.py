"""Setup: what a training knows before its first step, and the refusal of Groups, modules, Turns and batches that do not fit each other."""
import pytest
from torch import nn

from hpcfl.errors import LayoutError
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.setup import set_up
from hpcfl.training.turns import Turn
from tests.support.small_nets import ENGINES, SGD, Net, batches, cross_entropy, net_group

ODD_BATCHES = {"nothing": (lambda batch: None, r"a batch of client 4 is None \(NoneType\), wanted a dict of tensors"),
               "a tuple": (lambda batch: (batch["x"], batch["y"]), "a batch of client 4 is a tuple of Tensor, Tensor, wanted a dict of tensors"),
               "an array": (lambda batch: batch | {"y": batch["y"].numpy()}, "a batch of client 4 is a dict of x: Tensor, y: ndarray, wanted a dict")}


@pytest.mark.parametrize("change, wanted", ODD_BATCHES.values(), ids=ODD_BATCHES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_that_is_none_names_its_client(engine, change, wanted):
    def odd(client):
        return [change(batch) if client == 4 else batch for batch in batches([5, 5])(0)]
    group, turns = Group("net", (3, 4), net_group(2).state), [Turn(("model",), cross_entropy, SGD)]
    with pytest.raises(LayoutError, match=f"round 7: {wanted}"):
        fit(group, {"model": Net()}, turns, odd, engine=engine, where="round 7")
    with pytest.raises(LayoutError, match=r"round 7: the batches of client 3 are None \(NoneType\), wanted something to iterate over"):
        fit(group, {"model": Net()}, turns, lambda client: None, engine=engine, where="round 7")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exception_in_a_loss_says_where_it_was_raised(engine):
    def broken(modules, batch, context):
        return batch["labels"]
    with pytest.raises(KeyError) as raised:
        fit(net_group(1), {"model": Net()}, [Turn(("model",), broken, SGD)], batches([5]), engine=engine, where="round 7")
    assert any("round 7: the loss" in note and "broken of client 0" in note for note in raised.value.__notes__)


def test_a_state_of_another_type_than_its_module_is_refused():
    group = net_group(2)
    group = group.with_part("model", group.part("model") | {"head.bias": group.part("model")["head.bias"].double()})
    with pytest.raises(LayoutError, match=r"'model/head.bias' of a client is \(3,\) float64, in the module it is \(3,\) float32"):
        fit(group, {"model": Net()}, [Turn(("model",), cross_entropy, SGD)], batches([5, 5]))


def test_arguments_that_do_not_fit_are_refused():
    group, turn, data = net_group(2), Turn(("model",), cross_entropy, SGD), batches([5, 5])
    with pytest.raises(LayoutError, match="trains .*generator"):
        fit(group, {"model": Net()}, [Turn(("generator",), cross_entropy, SGD)], data)
    with pytest.raises(LayoutError, match="model/weight"):
        fit(group, {"model": nn.Linear(2, 2)}, [turn], data)
    with pytest.raises(LayoutError, match="scope"):
        fit(group, {"model": Net()}, [Turn(("model",), cross_entropy, SGD, scope=lambda path: False)], data)
    with pytest.raises(LayoutError, match="one path"):
        fit(group, {"model": Net()}, [turn, turn], data, keep_optimizer=True)
    with pytest.raises(LayoutError, match="share one parameter"):
        net = Net()
        fit(group.with_common_part("twin", net.state_dict()), {"model": net, "twin": net}, [turn], data)


def test_what_is_trained_held_shared_and_returned_follows_from_group_modules_and_turns():
    judge = nn.Linear(3, 1)
    net = Net()
    net.body[0].bias.requires_grad_(False)
    turn = Turn(("model",), cross_entropy, SGD, scope=lambda path: path.startswith("model/body.0."))
    setup = set_up(net_group(2), {"model": net, "judge": judge}, [turn], keep_optimizer=True, channels_last=True, where="here", forward_one=None,
                   forward_stacked=None, context={}, streams=None, member="client", origin="")
    assert setup.own["model/head.weight"] == "model.head.weight" and set(setup.shared) == {"judge.weight", "judge.bias"}
    assert setup.trained == (("model/body.0.weight",),), "a parameter that requires no gradient is trained"
    assert setup.slots == ({"momentum": ["optimizer/model/momentum/body.0.weight"]},)
    assert set(setup.buffers) == {f"model/body.{layer}.{name}" for layer in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(setup.returned) == {"model/body.0.weight", "optimizer/model/momentum/body.0.weight", *setup.buffers}
    assert setup.channels_last == {"model/body.0.weight", "model/body.4.weight"} and setup.images_last
    read, leaves = setup.bind(0, {path: leaf[0] for path, leaf in net_group(2).state.items()})
    assert [leaf.requires_grad for leaf in leaves] == [True] and read["model.body.0.weight"] is leaves[0] and not read["model.head.weight"].requires_grad
