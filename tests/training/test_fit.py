"""fit: both engines against plain torch loops and each other, what may and may not change, and how it fails."""
import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.nn import functional as F

from hpcfl import tree
from hpcfl.errors import JobError, LayoutError, NonFiniteError
from hpcfl.settings.sections import Training
from hpcfl.streams import Stream
from hpcfl.training import compiling
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn

SGD = Optimizer("sgd", 0.1, momentum=0.9, weight_decay=1e-3)
ADAM = Optimizer("adam", 1e-3, weight_decay=1e-3)
ENGINES = ("sequential", "vmap")


class Net(nn.Module):
    """Two convolutions with BatchNorm and a linear head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(6 * 4 * 4, 3)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def cross_entropy(modules, batch, context):
    return F.cross_entropy(modules.model(batch["x"]), batch["y"])


def states(build, name, count):
    trees = {}
    for client in range(count):
        with Stream(0, f"init/{name}", client).seeding():
            trees[client] = tree.join(**{name: build().state_dict()})
    return trees


def net_group(count=3):
    return Group.from_states("net", states(Net, "model", count))


def batches(sizes, batch=5, passes=1):
    """Batches of uneven shards, the last one of each pass partial."""
    def of(client):
        generator = Stream(0, "data", client).torch()
        x, y = torch.randn(sizes[client], 1, 8, 8, generator=generator), torch.randint(0, 3, (sizes[client],), generator=generator)
        for _ in range(passes):
            yield from ({"x": a, "y": b} for a, b in zip(x.split(batch), y.split(batch), strict=True))
    return of


def close(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for path in one:
        torch.testing.assert_close(one[path], other[path], rtol=0, atol=tolerance, equal_nan=True, msg=lambda text, path=path: f"{path}: {text}")


def plain(group, client, data, optimizer, passes=1):
    """What anybody would write: one client's net trained with torch.optim."""
    net = Net()
    net.load_state_dict(tree.part(group.states()[client], "model"))
    settings = {"params": net.parameters(), "lr": optimizer.lr, "weight_decay": optimizer.weight_decay, "fused": True}
    rule = {"sgd": lambda: torch.optim.SGD(momentum=optimizer.momentum, **settings),
            "adam": lambda: torch.optim.Adam(betas=optimizer.betas, **settings)}[optimizer.name]()
    losses = []
    for _ in range(passes):
        for batch in data(client):
            rule.zero_grad()
            losses.append(F.cross_entropy(net(batch["x"]), batch["y"]))
            losses[-1].backward()
            if optimizer.clip:
                nn.utils.clip_grad_norm_(net.parameters(), optimizer.clip)
            rule.step()
    return net.state_dict(), torch.stack(losses).mean().item()


@pytest.mark.parametrize("optimizer", [Optimizer("sgd", 0.1), SGD, ADAM, Optimizer("sgd", 0.1, clip=0.5)], ids=["sgd", "momentum", "adam", "clip"])
def test_sequential_equals_a_plain_loop_bit_for_bit(optimizer):
    group, data = net_group(2), batches([13, 7])
    trained, metrics = fit(group, {"model": Net()}, [Turn(("model",), cross_entropy, optimizer)], data, engine="sequential", channels_last=False)
    for index, client in enumerate(group.clients):
        state, loss = plain(group, client, data, optimizer)
        got = tree.row(trained.part("model"), index)
        for path in state:
            assert torch.equal(got[path], state[path]), path
        assert metrics["loss"][index].item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("frozen_norm", [False, True])
@pytest.mark.parametrize("optimizer", [SGD, ADAM, Optimizer("sgd", 0.1, clip=0.5)], ids=["momentum", "adam", "clip"])
def test_engines_agree_with_batchnorm_and_uneven_shards(optimizer, frozen_norm):
    group, turns, data = net_group(4), [Turn(("model",), cross_entropy, optimizer)], batches([13, 7, 10, 3])
    (one, measured), (other, measured_too) = (fit(group, {"model": Net()}, turns, data, engine=engine, frozen_norm=frozen_norm) for engine in ENGINES)
    close(one.state, other.state)
    close(measured, measured_too)
    counts = one.state["model/body.1.num_batches_tracked"].tolist()
    assert counts == ([0] * 4 if frozen_norm else [3, 2, 2, 1])
    assert torch.equal(one.state["model/body.1.running_mean"], group.state["model/body.1.running_mean"]) == frozen_norm


def test_a_client_is_the_same_bits_in_any_group():
    data, turns = batches([13, 7, 10]), [Turn(("model",), cross_entropy, ADAM)]
    group = net_group(3)
    together = fit(group, {"model": Net()}, turns, data)[0].states()
    for client in group.clients:
        alone = fit(group.select([client]), {"model": Net()}, turns, data)[0].states()[client]
        assert tree.equal(alone, together[client])


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


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_of_one_group_may_have_taken_different_numbers_of_adam_steps(engine):
    turns, data = [Turn(("model",), cross_entropy, ADAM)], batches([20, 10])
    group = net_group(2)
    ahead = fit(group.select([0]), {"model": Net()}, turns, data, keep_optimizer=True, engine=engine)[0]
    mixed = group.with_rows(ahead)
    assert mixed.state["optimizer/model/step/head.bias"].tolist() == [4, 0]
    trained = fit(mixed, {"model": Net()}, turns, data, keep_optimizer=True, engine=engine)[0]
    assert trained.state["optimizer/model/step/head.bias"].tolist() == [8, 2]
    fresh = fit(group.select([1]), {"model": Net()}, turns, data, keep_optimizer=True, engine=engine)[0]
    close(trained.states()[1], fresh.states()[1])
    close(trained.states()[0], fit(ahead, {"model": Net()}, turns, data, keep_optimizer=True, engine=engine)[0].states()[0])


class Generator(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))


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


def noisy_batches(sizes):
    def of(client):
        generator = Stream(0, "noise", client).torch()
        for size in sizes[client]:
            yield {"x": torch.randn(size, 6, generator=generator), "z": torch.randn(size, 4, generator=generator)}
    return of


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


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_names_the_clients_and_the_place(engine):
    def poisoned(client):
        for batch in batches([10, 10, 10])(client):
            yield batch | {"x": batch["x"] * math.nan} if client == 1 else batch
    with pytest.raises(NonFiniteError, match=r"round 7.*client 1 "):
        fit(net_group(3), {"model": Net()}, [Turn(("model",), cross_entropy, SGD)], poisoned, engine=engine, where="round 7")


@pytest.mark.parametrize("engine", ENGINES)
def test_infinite_weights_after_the_last_loss_are_found(engine):
    group = Group.from_states("line", states(lambda: nn.Linear(1, 1), "model", 2))

    def loss(modules, batch, context):
        return (modules.model(batch["x"]) * batch["x"]).sum()
    with pytest.raises(NonFiniteError, match="client 0 "):
        fit(group, {"model": nn.Linear(1, 1)}, [Turn(("model",), loss, Optimizer("sgd", 1.0))],
            lambda client: [{"x": torch.full((1, 1), 1e18 if client else 3e19)}], engine=engine)


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


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_nobody_can_compute_with_are_refused_and_the_setting_at_work_is_named(engine):
    rule = Optimizer("sgd", 1e30, rate_setting="algorithm.server_lr = 1e+30")
    with pytest.raises(NonFiniteError, match=r"round 7: training of client 0(, 1)? left weights of up to \S+e\+\d+, with which nobody can compute: "
                                             r"their squares are infinite; lower the learning rate \(algorithm.server_lr = 1e\+30\)$"):
        fit(net_group(2), {"model": Net()}, [Turn(("model",), cross_entropy, rule)], batches([5, 5]), engine=engine, where="round 7")


@pytest.mark.parametrize("clip, told", [(0.0, "training.clip = 0: not at all"), (5.0, "training.clip = 5")])
def test_clipping_is_advised_where_it_is_read(clip, told):
    rule = Optimizer.from_settings(Training(lr=1e30, clip=clip))
    assert rule.advice == f"lower the learning rate (training.lr = 1e+30) or bound the gradient norm ({told})"
    assert Optimizer("sgd", 1e30).advice == "lower the learning rate (1e+30)"


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_client_began_with_is_blamed_where_it_is_at_fault(engine):
    group = net_group(2)
    state = tree.clone(group.state)
    state["model/head.weight"][1, 0, 0] = math.nan
    begun, sane = replace(group, state=state), [Turn(("model",), cross_entropy, SGD)]
    told = (r"training of client 1 reached NaN or infinity in its loss or weights; but 'model/head.weight' of client 1 held it before its first step: "
            r"what it received, or its data or loss, is at fault, not its training; lower algorithm.server_lr$")
    with pytest.raises(NonFiniteError, match=told):
        fit(begun, {"model": Net()}, sane, batches([5, 5]), engine=engine, origin="lower algorithm.server_lr")
    state["model/head.weight"][1] = torch.linspace(-1e18, 1e18, 3)[:, None]
    with pytest.raises(NonFiniteError, match=r"but the loss of client 1 was \d\S*e\+1\d before its first step"):
        fit(begun, {"model": Net()}, [Turn(("model",), cross_entropy, Optimizer("sgd", 1e3))], batches([5, 50]), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_loss_leaves_out_is_neither_moved_nor_decayed(engine):
    group = net_group(2)

    def loss(modules, batch, context):
        return modules.model.features(batch["x"]).square().mean()
    trained = fit(group, {"model": Net()}, [Turn(("model",), loss, ADAM)], batches([10, 7]), engine=engine, keep_optimizer=True)[0]
    assert torch.equal(trained.state["model/head.weight"], group.state["model/head.weight"])
    assert trained.state["optimizer/model/step/head.weight"].tolist() == [0, 0]
    assert trained.state["optimizer/model/step/body.0.weight"].tolist() == [2, 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_share_or_repeat_memory_are_applied_right(engine):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Parameter(torch.zeros(3, 2)) for _ in range(3))
    group = Group.from_states("sum", states(Sum, "model", 2))

    def loss(modules, batch, context):
        m = modules.model
        return (m.one + m.two).sum() + (m.three.t() * batch["w"]).sum()
    w = torch.arange(6.0).view(2, 3)
    trained = fit(group, {"model": Sum()}, [Turn(("model",), loss, Optimizer("sgd", 1.0, clip=1.0))], lambda client: [{"w": w}], engine=engine)[0]
    norm, ones = math.sqrt(12 + w.square().sum()), torch.ones(3, 2)
    close(tree.row(trained.state, 1), {"model/one": -ones / norm, "model/two": -ones / norm, "model/three": -w.t() / norm})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_without_batches_stays_as_it_is(engine):
    group = net_group(2)
    trained, metrics = fit(group, {"model": Net()}, [Turn(("model",), cross_entropy, SGD)],
                           lambda client: batches([10])(client) if client == 0 else (), engine=engine)
    assert tree.equal(trained.states()[1], group.states()[1]) and not tree.equal(trained.states()[0], group.states()[0])
    assert metrics["loss"].isnan().tolist() == [False, True]


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
    with pytest.raises(LayoutError, match="scalar"):
        fit(group, {"model": Net()}, [Turn(("model",), lambda modules, batch, context: modules.model(batch["x"]), SGD)], data)
    with pytest.raises(LayoutError, match="share one parameter"):
        net = Net()
        fit(group.with_common_part("twin", net.state_dict()), {"model": net, "twin": net}, [turn], data)
    with pytest.raises(JobError, match="engine = 'parallel'"):
        fit(group, {"model": Net()}, [turn], data, engine="parallel")
    with pytest.raises(JobError, match="optimizer = 'lion'"):
        Optimizer("lion", 0.1)


@pytest.mark.parametrize(("engine", "backend"), [("sequential", "aot_eager"), ("vmap", "aot_eager"), ("vmap", "inductor")])
def test_compiled_equals_eager(engine, backend, compile_with, caplog):
    compile_with(backend)
    group = Group.from_states("gan", states(Generator, "generator", 2))
    turn = Turn(("generator",), lambda modules, batch, context: modules.generator(batch["z"]).square().mean(), ADAM)
    with inductor.patch(compile_threads=1):                        # starting workers takes longer than compiling
        eager, fast = (fit(group, {"generator": Generator()}, [turn], noisy_batches([(5, 5), (5, 5)]), engine=engine, compile=choice)[0].state
                       for choice in ("off", "on"))
        graphs = counters["stats"]["unique_graphs"]
        fit(group, {"generator": Generator()}, [turn], noisy_batches([(5,), (5,)]), engine=engine, compile="on")
    assert counters["stats"]["unique_graphs"] == graphs            # the next round compiles nothing
    compiling.compile_forward.cache_clear()
    assert not [record for record in caplog.records if record.name.startswith("hpcfl")]
    close(eager, fast)


def test_without_a_compiler_training_goes_on_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    compiling.compile_forward.cache_clear()
    torch.compiler.reset()
    group = Group.from_states("gan", states(Generator, "generator", 2))
    turn = Turn(("generator",), lambda modules, batch, context: modules.generator(batch["z"]).abs().mean(), ADAM)
    with caplog.at_level(logging.WARNING, logger="hpcfl"), inductor.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        results = [fit(group, {"generator": Generator()}, [turn], noisy_batches([(5,), (5,)]), compile=choice)[0].state
                   for choice in ("on", "on", "off")]
    compiling.compile_forward.cache_clear()
    assert tree.equal(results[0], results[2]) and tree.equal(results[1], results[2])
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hpcfl")]
    assert len(said) == 1 and said[0].startswith("torch.compile does not work here") and "\n" not in said[0]


def test_groups_are_built_selected_and_written_back():
    group = net_group(3)
    with pytest.raises(LayoutError, match="'model/head.weight' of client 1 is .*client 0 has"):
        Group.from_states("net", {0: tree.row(group.state, 0), 1: tree.row(group.state, 1) | {"model/head.weight": torch.zeros(2, 2)}})
    with pytest.raises(LayoutError, match="no clients .7."):
        group.select([1, 7])
    with pytest.raises(LayoutError, match="wanted 2 rows"):
        Group("net", (0, 1), group.state)
    half = group.select([2, 0])
    assert half.clients == (0, 2)
    zero = half.with_common_part("model", tree.transform(tree.row(half.part("model"), 0), torch.zeros_like))
    back = group.with_rows(zero)
    assert tree.equal(back.states()[1], group.states()[1]) and all(not leaf.any() for leaf in back.states()[2].values())
    with pytest.raises(LayoutError, match="cannot take rows"):
        half.with_rows(group)
    with pytest.raises(LayoutError, match="'extra/bias' is in only one"):
        group.with_rows(half.with_part("extra", {"bias": torch.zeros(2, 1)}))
    assert not group.without("model").state
