"""fit: what it trains, what it leaves alone, what goes on from one training to the next, and arguments that do not exist."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hpcfl import tree
from hpcfl.errors import JobError
from hpcfl.streams import Stream
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn
from tests.support.small_nets import ADAM, ENGINES, SGD, Generator, Net, batches, close, cross_entropy, net_group, noisy_batches, plain, states


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["momentum", "adam"])
def test_kept_optimizer_state_goes_on_where_it_stopped(engine, optimizer):
    turns = [Turn(("model",), cross_entropy, optimizer)]
    group, data = net_group(2), batches([10, 5])

    def run(start, passes, keep):
        return fit(start, {"model": Net()}, turns, batches([10, 5], passes=passes), engine=engine, keep_optimizer=keep, channels_last=False)[0]
    twice = run(run(group, 1, True), 1, True)
    close(twice.part("model"), run(group, 2, True).part("model"), 0 if engine == "sequential" else 1e-6)
    forgetful = run(run(group, 1, False), 1, False)
    assert not forgetful.part("optimizer")
    assert not torch.equal(forgetful.state["model/head.weight"], twice.state["model/head.weight"])
    expected = plain(group, 1, data, optimizer, passes=2)[0]
    close(tree.row(twice.part("model"), 1), expected)


class Discriminator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def judging(modules, batch, context):
    real, fake = modules.discriminator(batch["x"]), modules.discriminator(modules.generator(batch["z"]).detach())
    loss = F.softplus(-real).mean() + F.softplus(fake).mean()
    return loss, {"judging": loss}


def deceiving(modules, batch, context):
    loss = F.softplus(-modules.discriminator(modules.generator(batch["z"]))).mean()
    return loss, {"deceiving": loss}


def adversaries(count):
    trees = [states(Generator, "generator", count), states(Discriminator, "discriminator", count)]
    return Group.from_states("gan", {client: trees[0][client] | trees[1][client] for client in range(count)})


@pytest.mark.parametrize("engine", ENGINES)
def test_two_turns_are_the_usual_adversarial_loop(engine):
    group, data, rule = adversaries(2), noisy_batches([(5, 5, 3), (5, 4)]), Optimizer("adam", 1e-2, betas=(0.5, 0.999))
    turns = [Turn(("discriminator",), judging, rule), Turn(("generator",), deceiving, rule)]
    trained, metrics = fit(group, {"generator": Generator(), "discriminator": Discriminator()}, turns, data, engine=engine, keep_optimizer=True)
    for index, client in enumerate(group.clients):
        g, d = Generator(), Discriminator()
        g.load_state_dict(tree.row(group.part("generator"), index))
        d.load_state_dict(tree.row(group.part("discriminator"), index))
        rules = [torch.optim.Adam(net.parameters(), 1e-2, (0.5, 0.999)) for net in (d, g)]
        nets, judged, deceived = type("Nets", (), {"generator": g, "discriminator": d}), [], []
        for batch in data(client):
            for rule_, loss, seen in zip(rules, (judging, deceiving), (judged, deceived), strict=True):
                rule_.zero_grad()
                value = loss(nets, batch, {})[0]
                value.backward()
                rule_.step()
                seen.append(value.item())
        close(tree.row(trained.part("generator"), index), g.state_dict())
        close(tree.row(trained.part("discriminator"), index), d.state_dict())
        assert metrics["judging"][index].item() == pytest.approx(sum(judged) / len(judged), abs=1e-5)
        assert metrics["loss"][index].item() == pytest.approx(sum(judged + deceived) / (2 * len(judged)), abs=1e-5)
    assert trained.state["optimizer/generator/step/0.weight"].tolist() == [3, 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_scope_trains_the_head_and_nothing_else(engine):
    group, seen = net_group(2), []

    def loss(modules, batch, context):
        seen.append({name: parameter.requires_grad for name, parameter in modules.named_parameters()})
        return cross_entropy(modules, batch, context)
    turn = Turn(("model",), loss, SGD, scope=lambda path: path.startswith("model/head."))
    trained = fit(group, {"model": Net()}, [turn], batches([10, 7]), engine=engine, keep_optimizer=True)[0]
    changed = {path for path in group.state if not torch.equal(group.state[path], trained.state[path])}
    assert changed == {"model/head.weight", "model/head.bias"}
    assert set(trained.part("optimizer")) == {"model/momentum/head.weight", "model/momentum/head.bias"}
    assert engine == "vmap" or all(needs == name.startswith("model.head.") for flags in seen for name, needs in flags.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_frozen_module_passes_gradients_and_stays_as_it_is(engine):
    with Stream(0, "shared").seeding():
        judge = Net()
    judge.body[0].weight.requires_grad_(False)
    judge.head.eval()
    group = Group.from_states("gan", states(lambda: nn.Linear(4, 64), "generator", 2))
    weights, flags = tree.clone(judge.state_dict()), ([p.requires_grad for p in judge.parameters()], [m.training for m in judge.modules()])

    def loss(modules, batch, context):
        assert not modules.model.training and not modules.model.body[1].training
        return F.cross_entropy(modules.model(modules.generator(batch["z"]).unflatten(1, (1, 8, 8))), context["label"].expand(len(batch["z"])))
    trained, metrics = fit(group, {"model": judge, "generator": nn.Linear(4, 64)}, [Turn(("generator",), loss, Optimizer("adam", 0.05))],
                           lambda client: [{"z": torch.ones(3, 4)}] * 20, context={"label": torch.tensor(1)}, engine=engine)
    assert tree.equal(weights, judge.state_dict())
    assert flags == ([p.requires_grad for p in judge.parameters()], [m.training for m in judge.modules()])
    assert trained.state.keys() == group.state.keys() and metrics["loss"].max() < 0.9


@pytest.mark.parametrize("engine", ENGINES)
def test_flags_and_weights_come_back_after_an_exception(engine):
    net = Net().eval()
    net.body[0].weight.requires_grad_(False)
    net.body[1].train()
    weights, group = tree.clone(net.state_dict()), net_group(2)
    kept = tree.clone(group.state)

    def broken(modules, batch, context):
        modules.model(batch["x"])
        raise RuntimeError("halfway")
    with pytest.raises(RuntimeError, match="halfway"):
        fit(group, {"model": net}, [Turn(("model",), broken, SGD)], batches([5, 5]), engine=engine)
    assert [module.training for module in net.modules()] == [module is net.body[1] for module in net.modules()]
    assert [parameter.requires_grad for parameter in net.parameters()] == [parameter is not net.body[0].weight for parameter in net.parameters()]
    assert tree.equal(weights, net.state_dict()) and tree.equal(kept, group.state)
    assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_callers_group_and_modules_are_not_written(engine):
    net, group = Net(), net_group(3)
    weights, kept = tree.clone(net.state_dict()), tree.clone(group.state)
    trained = fit(group, {"model": net}, [Turn(("model",), cross_entropy, SGD)], batches([13, 7, 10]), engine=engine)[0]
    assert tree.equal(weights, net.state_dict()) and tree.equal(kept, group.state)
    assert not any(torch.equal(kept[path], trained.state[path]) for path in kept)


def test_channels_last_changes_nothing_but_rounding():
    group, turns, data = net_group(2), [Turn(("model",), cross_entropy, ADAM)], batches([13, 7])
    one, other = (fit(group, {"model": Net()}, turns, data, keep_optimizer=True, channels_last=choice)[0] for choice in (True, False))
    close(one.state, other.state)
    assert all(leaf.is_contiguous() for leaf in one.state.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_computes_the_loss_in_half_and_keeps_weights_in_full(engine):
    kinds = set()

    def loss(modules, batch, context):
        logits = modules.model(batch["x"])
        kinds.add(logits.dtype)
        return F.cross_entropy(logits.float(), batch["y"])
    group, data = net_group(2), batches([10, 7])
    half, exact = (fit(group, {"model": Net()}, [Turn(("model",), loss, Optimizer("sgd", 0.05))], data, engine=engine, precision=precision)[0].state
                   for precision in ("bfloat16", "float32"))
    assert half["model/head.weight"].dtype == torch.float32
    assert engine == "vmap" or kinds == {torch.bfloat16, torch.float32}      # vmap on a CPU: torch casts matrix products, adds the bias in float32
    assert 0 < (half["model/head.weight"] - exact["model/head.weight"]).abs().max() < 0.02


@pytest.mark.parametrize("argument", ["engine", "compile", "precision"])
def test_an_argument_that_does_not_exist_is_refused_with_those_that_do(argument):
    with pytest.raises(JobError, match=f"here: {argument} = 'parallel' is not known; there are auto, "):
        fit(net_group(2), {"model": Net()}, [Turn(("model",), cross_entropy, SGD)], batches([5, 5]), where="here", **{argument: "parallel"})
