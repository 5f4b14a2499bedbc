"""GeFL and what GeFL-F shares with it: phases, the averaged generator, optimiser state that stays with its client, rates, and what crosses the wire."""
import pytest
import torch

from hpcfl import tree
from hpcfl.contract import ClientSite
from hpcfl.training.turns import Modules
from tests.support.gefl_doubles import (
    CLIENTS,
    GENERATORS,
    PLANS,
    adam,
    booked,
    classifier,
    described,
    loaded,
    mean,
    norms,
    optimizer_paths,
    phase_of,
    rows_of,
    scalars,
    watched,
    went,
)
from tests.support.in_memory import bits, world

# Phases


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("generator", "settings", "rounds", "phases"), [
    ("cvae", {"generator_rounds": 4}, 3, {"generator": 4, "targets": 3}),
    ("ddpm", {"generator_rounds": 4}, 3, {"generator": 4, "targets": 3}),
    ("vtc", {"generator_rounds": 4}, 3, {"generator": 4, "targets": 3}),
    ("dcgan", {"generator_rounds": 4}, 3, {"generator": 2, "both": 2, "targets": 1}),
    ("dcgan", {"generator_rounds": 5}, 3, {"generator": 3, "both": 2, "targets": 1}),
    ("dcgan", {"generator_rounds": 4}, 2, {"generator": 2, "both": 2}),
    ("dcgan", {"generator_rounds": 6}, 2, {"generator": 4, "both": 2}),
    ("dcgan", {"generator_rounds": 1}, 3, {"generator": 1, "targets": 3}),
    ("dcgan", {"generator_rounds": 4, "continued_rounds": 0}, 3, {"generator": 4, "targets": 3}),
    ("dcgan", {"generator_rounds": 4, "continued_rounds": 1}, 3, {"generator": 3, "both": 1, "targets": 2}),
    ("ddpm", {"generator_rounds": 4, "continued_rounds": 3}, 5, {"generator": 1, "both": 3, "targets": 2}),
    ("cvae", {"generator_rounds": 4, "continued_rounds": 9}, 5, {"both": 4, "targets": 1})])
def test_phases_follow_from_the_generator_and_the_rounds_asked_for(name, generator, settings, rounds, phases):
    plan = world(described(name, generator, settings | ({"warmup_rounds": 2} if name == "gefl_f" else {}), federation={"rounds": rounds})).plan
    wanted = ({"warmup": 2} if name == "gefl_f" else {}) | phases
    assert [(phase.name, phase.rounds) for phase in plan] == list(wanted.items())
    steps = {"warmup": 1, "generator": 1, "both": 2, "targets": 1}
    assert [len(phase.steps) for phase in plan] == [steps[phase] for phase in wanted]


# The averaged generator


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_mean_of_equal_states_is_that_state_to_the_bit(generator, monkeypatch):
    def nothing_learned(self, group, turns, batches, **options):
        return group, {"loss": torch.zeros(len(group.clients))}
    monkeypatch.setattr(ClientSite, "fit", nothing_learned)
    for weights in ("clients", "images"):
        found = went("gefl", generator, {"generator_weights": weights})
        assert bits(found.states[-1].server) == bits(found.states[0].server)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("generator", ["cvae", "dcgan"])
def test_the_generator_is_the_mean_of_what_clients_made_of_it(name, generator, monkeypatch):
    averages, calls = {}, watched(monkeypatch)
    for by in ("clients", "images"):
        calls.clear()
        found = went(name, generator, {"generator_weights": by})
        calls_of = [call for call in calls if (call.phase, call.round) == ("generator", 0)]
        clients = [client for call in calls_of for client in call.after.clients]
        images = torch.tensor([len(found.world.split.train[client]) for client in clients])
        server = found.states[rows_of(found, "generator")[0]].server
        assert sorted(clients) == list(range(CLIENTS)) and len(set(images.tolist())) > 1
        for network in phase_of(found, "generator").steps[0].networks:
            rows = [tree.select_floating(call.after.part(network)) for call in calls_of]
            assert tree.part(server, network).keys() == rows[0].keys()
            for path, leaf in tree.part(server, network).items():
                want = mean(torch.cat([row[path] for row in rows]), images if by == "images" else torch.ones(CLIENTS))
                torch.testing.assert_close(leaf.double(), want, rtol=1e-6, atol=1e-9)
        averages[by] = bits(server)
        assert any("running_var" in path for path in tree.part(server, "generator")), "running statistics are averaged like weights"
    assert averages["clients"] != averages["images"]


def test_batch_counters_of_generators_are_neither_held_nor_sent_by_anybody():
    found = went("gefl", "dcgan")
    paths = [path for state in found.states for path in state.server if path.startswith(("generator/", "discriminator/"))]
    assert paths and not [path for path in paths if "num_batches_tracked" in path]
    networks = phase_of(found, "generator").steps[0].initialise("test").values()
    assert norms(next(iter(networks))) and booked(found, 0, "up")[0] == 4 * sum(map(scalars, networks))


def test_client_states_carry_no_weights_of_a_generator_between_rounds():
    found = went("gefl", "dcgan", {"generator_rounds": 4})
    for state in found.states:
        assert {path.split("/")[0] for group in state.groups for path in group.state} <= {"model", "optimizer"}


# Optimiser state


@pytest.mark.parametrize("generator", GENERATORS)
def test_two_rounds_are_two_steps_of_one_adam_whose_weights_are_replaced_in_between(generator, monkeypatch):
    calls = watched(monkeypatch)
    found = went("gefl", generator, {"generator_batch": 1000, "continued_rounds": 0})              # one step per round
    taught = phase_of(found, "generator").steps[0]
    kind = taught.generative
    for client in range(CLIENTS):
        networks = taught.initialise("test")
        modules, optimizers = Modules(networks).train(), adam(kind, networks)
        for round_ in range(2):
            loaded(networks, found.states[round_].server)
            call = next(call for call in calls if (call.phase, call.round) == ("generator", round_) and client in call.after.clients)
            (batch,) = call.batches(client)
            for optimizer, (names, loss), rule in zip(optimizers, kind.losses(), kind.rules(), strict=True):
                for settings in optimizer.param_groups:
                    settings["lr"] = rule.lr * (1 - round_ / 2 if generator == "ddpm" else 1)
                leaves = [parameter for name in names for parameter in networks[name].parameters()]
                for leaf, gradient in zip(leaves, torch.autograd.grad(modules(loss, batch, {})[0], leaves), strict=True):
                    leaf.grad = gradient
                optimizer.step()
            sent, kept = call.after.states()[client], found.state(client, round_ + 1)
            for optimizer, (names, _) in zip(optimizers, kind.losses(), strict=True):
                for name in names:
                    for path, leaf in networks[name].named_parameters():
                        before = found.states[round_].server[f"{name}/{path}"]
                        if "weight" in path:                       # the gradient of a bias before a norm is rounding, which Adam makes as large as any
                            apart = (sent[f"{name}/{path}"] - leaf.detach()).norm() / (leaf.detach() - before).norm()
                            assert apart < 1e-2, (name, path, float(apart))
                        for slot in ("exp_avg", "exp_avg_sq"):
                            want = optimizer.state[leaf][slot]
                            assert (kept[f"optimizer/{name}/{slot}/{path}"] - want).abs().max() <= 1e-3 * want.abs().max() + 1e-6, (name, path, slot)
                        assert int(kept[f"optimizer/{name}/step/{path}"]) == int(optimizer.state[leaf]["step"]) == round_ + 1


@pytest.mark.parametrize("name", PLANS)
def test_moments_stay_with_their_client_while_the_generator_trains_and_go_when_it_rests(name):
    found = went(name, "dcgan", {"generator_rounds": 4, "width_g": 2, "width_d": 2}, federation={"rounds": 4})
    for phase in ("generator", "both"):
        for row in rows_of(found, phase):
            kept = [{path: found.state(client, row)[path] for path in optimizer_paths(found.state(client, row))} for client in range(CLIENTS)]
            assert {path.split("/")[1] for path in kept[0]} == {"generator", "discriminator"}, phase
            averaged = {path: leaf for path, leaf in kept[0].items() if "exp_avg" in path and leaf.any()}
            assert averaged and all(not torch.equal(leaf, kept[1][path]) for path, leaf in averaged.items())
    for client in range(CLIENTS):
        steps = -(-len(found.world.split.train[client]) // 16) * 4                                   # training.batch is 16, T_KA is 4
        assert {int(found.state(client, rows_of(found, "both")[-1])[path]) for path in kept[0] if "/step/" in path} == {steps}
        assert not [row for row in rows_of(found, "targets") if optimizer_paths(found.state(client, row))]
    assert not [path for state in found.states for path in state.server if "optimizer" in path]


def test_a_client_that_sits_a_round_out_keeps_its_moments():
    found = went("gefl", "vtc", {"generator_rounds": 4, "generator_batch": 1000}, federation={"participation": 0.34})
    for row in rows_of(found, "generator"):
        cohorts = [found.world.cohort(place.phase, place.row) for place in found.places[:row]]
        for client in range(CLIENTS):
            state = found.state(client, row)
            taken = {int(state[path]) for path in optimizer_paths(state) if "/step/" in path} or {0}
            assert taken == {sum(client in cohort for cohort in cohorts)}


# The rate


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("settings", "rate"), [({}, 1e-4), ({"generator_lr": 3e-3}, 3e-3)])
def test_the_rate_of_ddpm_falls_linearly_over_all_its_rounds_and_stays_above_zero(name, settings, rate, monkeypatch):
    calls = watched(monkeypatch)
    went(name, "ddpm", {"generator_rounds": 4, "continued_rounds": 2, **settings}, data={"fraction": 0.1})
    rates = {(call.phase, call.round): call.turns[0].optimizer.lr for call in calls if call.trains == {"generator"}}
    assert list(rates) == [("generator", 0), ("generator", 1), ("both", 0), ("both", 1)]
    assert list(rates.values()) == pytest.approx([rate, 0.75 * rate, 0.5 * rate, 0.25 * rate])


@pytest.mark.parametrize(("generator", "rate"), [("cvae", 1e-3), ("dcgan", 2e-4), ("vtc", 1e-3)])
def test_other_rates_stay(generator, rate, monkeypatch):
    calls = watched(monkeypatch)
    went("gefl", generator, {"generator_rounds": 3, "continued_rounds": 1}, data={"fraction": 0.1})
    assert {turn.optimizer.lr for call in calls if "generator" in call.trains for turn in call.turns} == {rate}
    assert {turn.optimizer.name for call in calls if "generator" in call.trains for turn in call.turns} == {"adam"}


# Bytes


@pytest.mark.parametrize(("generator", "weights"), [("cvae", "clients"), ("dcgan", "clients"), ("dcgan", "images")])
def test_bytes_of_a_whole_run_are_those_of_the_specification(generator, weights):
    """Beyond 2.3 the simulator counts, per client: the last average of its model, which it holds at the end; the batch counters of that model's norms
    (8 bytes each) with every download of it; n_k (8 bytes) once per target round, and per generator round where that is how the generator is weighted."""
    ka, tn = 4, 3
    found = went("gefl", generator, {"generator_rounds": ka, "generator_weights": weights}, federation={"rounds": tn})
    networks = phase_of(found, "generator").steps[0].initialise("test")
    g, w = scalars(networks["generator"]), sum(map(scalars, networks.values()))
    assert w > g
    for client in range(CLIENTS):
        model = classifier(found, client)
        theta, counters = scalars(model), 8 * len(norms(model))
        down, up = sum(booked(found, client, "down")), sum(booked(found, client, "up"))
        assert up == 4 * (ka * w + tn * theta) + 8 * (tn + (ka if weights == "images" else 0))
        assert down == 4 * (ka * w + g + tn * theta) + 4 * theta + counters * (tn + 1)
        specification = 2 * 4 * ka * w + 4 * g + 2 * 4 * tn * theta
        assert down + up - specification == 4 * theta + counters * (tn + 1) + 8 * (tn + (ka if weights == "images" else 0))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("generator", "network"), [("cvae", "encoder"), ("dcgan", "discriminator")])
def test_what_trains_a_generator_is_in_no_message_of_target_training(name, generator, network):
    found = world(described(name, generator, {"continued_rounds": 1}))
    parts = {phase.name: [{path.split("/")[0] for path in step.publish(found.found())} for step in phase.steps] for phase in found.plan}
    assert network in parts["generator"][0] & parts["both"][1] and not {network} & (parts["both"][0] | parts["targets"][0])
    assert "generator" in parts["both"][0] & parts["targets"][0]


def test_a_frozen_generator_is_sent_once_and_what_trains_it_no_more():
    found = went("gefl", "cvae")
    g, w = (sum(scalars(network) for name, network in phase_of(found, "generator").steps[0].initialise("test").items() if name in wanted)
            for wanted in (("generator",), ("generator", "encoder")))
    for client in range(CLIENTS):
        model = classifier(found, client)
        size = 4 * scalars(model) + 8 * len(norms(model))
        assert booked(found, client, "down") == [4 * w, 4 * w, 4 * g + 2 * size, size, size]
        assert booked(found, client, "up") == [4 * w] * 2 + [4 * scalars(model) + 8] * 3


def test_a_gan_that_goes_on_training_travels_once_per_round():
    """Its generator goes down with the models, and not again for its own training; without rounds in which it rests its last average goes nowhere."""
    found = went("gefl", "dcgan", {"generator_rounds": 4}, federation={"rounds": 2})
    w = sum(map(scalars, phase_of(found, "generator").steps[0].initialise("test").values()))
    for client in range(CLIENTS):
        model = classifier(found, client)
        size = 4 * scalars(model) + 8 * len(norms(model))
        assert booked(found, client, "down") == [4 * w, 4 * w, 4 * w + 2 * size, 4 * w + size]
        assert booked(found, client, "up") == [4 * w] * 2 + [4 * w + 4 * scalars(model) + 8] * 2
