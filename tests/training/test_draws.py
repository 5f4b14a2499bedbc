"""Draws from global generators by what users bring: a function of client, round and step, whatever the engine, the Group, the rank and the restart."""
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor import config as inductor
from torch.nn import functional as F

from hpcfl import tree
from hpcfl.algorithms.fedavg import Config, FedAvg
from hpcfl.contract import Phase, Update
from hpcfl.federation.exchange import Exchange
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.loop import rounds
from hpcfl.federation.state import begin
from hpcfl.streams import Stream, keeping_generators, sow
from hpcfl.training import compiling
from hpcfl.training.fit import fit
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn
from tests.support.in_memory import bits, job, world

ENGINES = ("sequential", "vmap")
SGD = Optimizer("sgd", 0.1, momentum=0.9)


class Dropping(nn.Module):
    """Convolution, norm and two kinds of dropout: over maps, which the sequential engine lays out channels last, and over features."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten())
        self.head = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x):
        return self.head(F.dropout(self.body(x), 0.4, self.training))


def plain(modules, batch, context):
    return F.cross_entropy(modules.model(batch["x"]), batch["y"])


def noisy(modules, batch, context):
    """Noise of every kind: made at once and filled in place, and from the generators of NumPy and Python."""
    x = batch["x"] + 0.3 * torch.rand_like(batch["x"]) + 0.1 * torch.empty(4).normal_()
    return F.cross_entropy(modules.model(x), batch["y"]) * (1 + np.random.random()) + random.random() * modules.model.head.bias.square().sum()


def by_values(modules, batch, context):
    """Control flow by values, which vmap has none of."""
    loss = plain(modules, batch, context)
    return loss * 2 if float(loss.detach()) > 1 else loss


LOSSES = {"dropout": plain, "a noisy loss": noisy}


def group(count=3):
    states = {}
    for client in range(count):
        with Stream(0, "init", client).seeding():
            states[client] = tree.join(model=Dropping().state_dict())
    return Group.from_states("net", states)


def batches(client):
    """Two shapes of batches, and of client 1 fewer."""
    generator = Stream(0, "data", client).torch()
    for size in (5, 5, 3)[client % 2:]:
        yield {"x": torch.randn(size, 1, 4, 4, generator=generator), "y": torch.randint(0, 3, (size,), generator=generator)}


def trained(loss, engine, start=None, seed=7, **settings):
    modules, settings = {"model": Dropping()}, {"streams": lambda client: Stream(seed, "draws", client), **settings}
    return fit(start or group(), modules, [Turn(("model",), loss, SGD)], batches, engine=engine, **settings)[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_what_a_loss_draws_follows_from_its_stream_alone(loss, engine):
    first = trained(loss, engine)
    sow(12345)
    assert bits(trained(loss, engine).state) == bits(first.state)
    assert bits(trained(loss, engine, seed=8).state) != bits(first.state)


@pytest.mark.parametrize("loss", [*LOSSES.values(), by_values], ids=[*LOSSES, "control flow"])
def test_both_engines_draw_the_very_same_numbers(loss):
    one, other = (trained(loss, engine).state for engine in ENGINES)
    for path, leaf in one.items():
        torch.testing.assert_close(other[path], leaf, rtol=0, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")
    assert one["model/body.1.num_batches_tracked"].tolist() == [3, 2, 3], "what an engine tried in vain left something in a buffer"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_draws_the_same_in_any_group(engine):
    together = trained(noisy, engine).states()
    for client in range(3):
        alone = trained(noisy, engine, group().select([client])).states()[client]
        for path, leaf in alone.items():
            torch.testing.assert_close(together[client][path], leaf, rtol=0, atol=0 if engine == "sequential" else 1e-6)


def test_clients_and_steps_draw_different_numbers():
    seen = []

    def watched(modules, batch, context):
        seen.append(float(torch.rand(())))
        return plain(modules, batch, context)
    trained(watched, "sequential")
    assert len(seen) == 3 + 2 + 3 and len(set(seen)) == len(seen)


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_that_break_their_promise_still_follow_from_the_stream(engine):
    def drawing(client):
        for batch in batches(client):
            yield batch | {"x": torch.randn_like(batch["x"])}

    def once(seed):
        sow(seed)
        return fit(group(), {"model": Dropping()}, [Turn(("model",), plain, SGD)], drawing, engine=engine)[0].state
    assert bits(once(1)) == bits(once(2))


@pytest.mark.parametrize("engine", ENGINES)
def test_training_leaves_the_global_generators_where_they_were(engine):
    start, modules, turns = group(), {"model": Dropping()}, [Turn(("model",), noisy, SGD)]
    sow(3)
    wanted = torch.rand(2).tolist(), np.random.random(), random.random()
    sow(3)
    fit(start, modules, turns, batches, engine=engine)
    assert (torch.rand(2).tolist(), np.random.random(), random.random()) == wanted


def test_a_compiled_network_draws_what_it_draws_uncompiled(compile_with):
    def dropping(modules, batch, context):
        return F.cross_entropy(F.dropout(modules.model(batch["x"].flatten(1)), 0.5), batch["y"])
    compile_with("aot_eager")
    start = Group.from_states("linear", {client: tree.join(model=nn.Linear(16, 3).state_dict()) for client in range(2)})
    with inductor.patch(fallback_random=False):
        compiled, eager = (fit(start, {"model": nn.Linear(16, 3)}, [Turn(("model",), dropping, SGD)], lambda client: list(batches(0))[:2],
                               engine="sequential", compile=choice)[0].state for choice in ("on", "off"))
        assert inductor.fallback_random, "inductor would draw numbers of its own"
    compiling.compile_forward.cache_clear()
    for path, leaf in eager.items():
        torch.testing.assert_close(compiled[path], leaf, rtol=0, atol=1e-6)


def quiet(modules, batch, context):
    return F.cross_entropy(modules.model.head(modules.model.body[0](batch["x"]).flatten(1)), batch["y"])


@pytest.mark.parametrize("loss, calls", [(quiet, 2), (plain, 1 + 2 * 3)], ids=["without draws", "with draws"])
def test_only_losses_that_draw_are_computed_client_by_client(loss, calls):
    """Of two steps of three clients: without draws one call each; with draws one that was in vain, then one for each client."""
    seen = []

    def counted(modules, batch, context):
        seen.append(1)
        return loss(modules, batch, context)
    fit(group(), {"model": Dropping()}, [Turn(("model",), counted, SGD)], lambda client: list(batches(0))[:2], engine="vmap")
    assert len(seen) == calls


# In a run

class Noisy(FedAvg):
    """FedAvg with a loss that draws, a second training in the same round, and noise of its own on what goes down, comes up and is agreed on."""

    def learn(self, group, message, site):
        group, first = site.train_model(group, noisy_model)
        group, second = site.train_model(group, noisy_model)
        return group, {"loss": first["loss"], "again": second["loss"]}

    def aggregate(self, server, totals, site):
        new = super().aggregate(server, totals, site)
        return new | {path: leaf + 1e-3 * torch.randn(leaf.shape) for path, leaf in tree.select_floating(new).items()}

    def refine(self, group, message, site):
        return Update(self.adopt(group, message))


def noisy_model(modules, batch, context):
    return F.cross_entropy(modules.model(batch["x"] + torch.randn_like(batch["x"])), batch["y"])


def went(start=None, **sections):
    """The states of a run of Noisy, from its beginning or from one of them."""
    found = world(job("fedavg", **{"models": {"names": ["mlp2", "cnn1"], "feature_size": 6}, "federation": {"clients": 4, "rounds": 3}, **sections}))
    found.plan = (Phase("rounds", 3, (Noisy(Config(), found.problem),)),)
    with keeping_generators():
        sow(random.SystemRandom().randrange(2 ** 32))
        exchange = Exchange(found, Ledger(found.problem.device), lambda state, place: None)
        return [state for state, _ in rounds(exchange, start or begin(found))]


def told(state):
    return bits(state.server), {client: bits(own) for group in state.groups for client, own in group.states().items()}


def test_a_run_that_draws_repeats_itself_and_goes_on_after_a_restart():
    whole = went()
    assert told(went()[-1]) == told(whole[-1])
    assert told(went(whole[1])[-1]) == told(whole[-1])


def test_a_deterministic_run_that_draws_does_not_depend_on_who_trains_beside_whom():
    whole, apart = (went(run={"device": "cpu", "compile": "off", "deterministic": True}, residency={"chunk": chunk}) for chunk in (0, 1))
    assert told(apart[-1]) == told(whole[-1])


def test_two_trainings_of_a_client_in_one_round_draw_different_numbers():
    found, seen = world(job("fedavg", federation={"clients": 2, "rounds": 1})), []

    def watched(modules, batch, context):
        seen.append(float(torch.rand(())))
        return F.cross_entropy(modules.model(batch["x"]), batch["y"])
    phase = found.plan[0]
    for group_ in found.join():
        for _ in range(2):
            found.client_site(group_, phase, 0).train_model(group_, watched)
    assert len(seen) > 4 and len(set(seen)) == len(seen)
    before = list(seen)
    for group_ in found.join():
        found.client_site(group_, phase, 1).train_model(group_, watched)
    assert not set(before) & set(seen[len(before):])


class Projecting(FedAvg):
    """A method with a frozen network that no client holds."""

    def modules(self, architecture):
        return super().modules(architecture) | {"projection": nn.Linear(6, 3)}


def test_a_network_that_no_client_holds_is_the_same_for_all_groups_ranks_and_restarts():
    def built(seed, names):
        sow(seed)
        found = world(job("fedavg", models={"names": names, "feature_size": 6}))
        found.plan = (replace(found.plan[0], steps=(Projecting(Config(), found.problem),)),)
        return [bits(networks["projection"].state_dict()) for networks in found.modules.values()]
    first, second, third = *built(1, ["mlp2", "cnn1"]), *built(2, ["resnet8"])
    assert first == second == third
