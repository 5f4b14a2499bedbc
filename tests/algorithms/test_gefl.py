"""GeFL and what GeFL-F shares with it: phases, the averaged generator, what the clients learn from, and what crosses the wire."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from hpcfl import tree
from hpcfl.algorithms.gefl import TrainTargets
from hpcfl.contract import ClientSite, Phase
from hpcfl.data.shards import Shard
from hpcfl.federation.state import schedule
from hpcfl.federation.world import World
from hpcfl.streams import Stream
from hpcfl.training import compiling
from hpcfl.training.turns import Modules
from tests.support import in_memory
from tests.support.gefl_doubles import (
    CLASSES,
    CLIENTS,
    GENERATORS,
    PLANS,
    adam,
    booked,
    classifier,
    described,
    inside,
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
from tests.support.in_memory import bits, finite, job, run, step, world

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

RANGE = {"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0)}
STATED = {"cvae": "unit", "dcgan": "symmetric", "ddpm": "unit", "vtc": "symmetric"}
CHOSEN = [*((generator, {}, stated) for generator, stated in STATED.items()),
          *((generator, {"image_range": "symmetric"}, "symmetric") for generator in ("cvae", "ddpm"))]
RESTS = {"continued_rounds": 0}                                    # a GAN too

# Target training


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("pool", ["client", "round"])
def test_targets_learn_from_samples_first_and_then_from_real_images(name, pool, monkeypatch):
    calls = watched(monkeypatch)
    found = went(name, "vtc", {"synthetic_epochs": 2, "pool": pool}, training={"batch": 60, "epochs": 3}, federation={"rounds": 2}, data={"fraction": 0.2})
    shape = phase_of(found, "targets").steps[0].generative.shape
    sizes = [len(part) for part in found.world.split.train]
    assert min(sizes) < 60 and max(sizes) >= 120, "fewer images than a batch, and as many as two"
    for round_ in range(2):
        for group in found.states[-1].groups:
            drawn, own = (call for call in calls if (call.phase, call.round) == ("targets", round_) and call.before.architecture == group.architecture)
            assert bits(own.before.part("model")) == bits(drawn.after.part("model")), "real images come after samples, to the model that learned from them"
            for client in group.clients:
                n = sizes[client]
                synthetic, real = drawn.batches(client), own.batches(client)
                assert [tuple(batch["x"].shape) for batch in synthetic] == [(min(n, 60), *shape)] * (2 * max(1, n // 60))
                assert all(batch["y"].shape == (min(n, 60),) and "index" not in batch for batch in synthetic)
                assert sum(len(batch["y"]) for batch in real) == 3 * n and torch.cat([batch["index"] for batch in real]).bincount().tolist() == [3] * n
                assert torch.equal(real[0]["y"], found.world.holdings[client].train.labels[real[0]["index"]])
            assert drawn.trains == own.trains == {"model"} and drawn.turns[0].optimizer == own.turns[0].optimizer == found.world.problem.optimizer()


def test_without_synthetic_epochs_target_training_is_fedavg_to_the_bit():
    found = went("gefl", "vtc", {"synthetic_epochs": 0})
    plain = world(job("fedavg"))
    plain.plan = (Phase("targets", plain.plan[0].rounds, plain.plan[0].steps),)                       # the phase's name is part of every stream's
    alone = run(plain)
    for row, position in zip(rows_of(found, "targets"), rows_of(alone, "targets"), strict=True):
        for client in range(CLIENTS):
            assert bits(tree.part(found.state(client, row), "model")) == bits(tree.part(alone.state(client, position), "model"))
    assert bits(found.state(0)) != bits(tree.join(model=tree.part(went("gefl", "vtc").state(0), "model"))), "samples change what is learned"


@pytest.mark.parametrize("pool", ["client", "round"])
def test_labels_of_samples_are_uniform_also_over_classes_that_a_client_lacks(pool):
    built = world(described("gefl", "vtc", {"synthetic_epochs": 300, "pool": pool}, data={"partition": "disjoint"}))
    targets, drawn = step(built, TrainTargets), []
    site = built.client_site(next(group for group in built.join() if 0 in group.clients), built.plan[-1], 0)

    def draw(y, random):
        drawn.append(y)
        return torch.zeros(len(y), *targets.generative.shape)
    labels = torch.cat([batch["y"] for batch in targets.draw_batches(draw, site, 0)])
    assert torch.equal(torch.cat(drawn), labels), "what a model learns of a sample is the class it was drawn for"
    assert int((site.holdings[0].train.labels.bincount(minlength=CLASSES) == 0).sum()) >= 6 and len(labels) > 10_000
    counts = labels.bincount(minlength=CLASSES).double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 27.9                      # chi-squared, 9 degrees of freedom: 1 in 1000


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("pool", "same"), [("round", True), ("client", False)])
def test_a_pool_is_the_same_for_all_clients_of_a_round_on_any_rank_and_new_in_each(pool, same, name):
    """Two worlds stand for two ranks: nothing but the seed and the server's state is common to them."""
    settings, smallest = {"pool": pool, "generator_rounds": 3, "continued_rounds": 1}, 10
    here, there = (went(name, "vtc", settings, federation={"rounds": 2}) for _ in range(2))
    assert min(len(part) for part in here.world.split.train) >= smallest

    def drawn(found, client, round_=0, phase="targets"):
        targets, _, message, site = inside(found, phase, client, round_, which=0)
        return list(targets.draw_batches(targets.build_drawer(message, site), site, client))

    def alike(one, other):
        return {all(torch.equal(a[name][:smallest], b[name][:smallest]) for name in ("x", "y")) for a, b in zip(one, other, strict=False)}
    first = drawn(here, 0)
    assert len(first) > 1 and alike(first, drawn(here, 0)) == {True} == alike(first, drawn(there, 0))
    assert alike(first, drawn(there, 1)) == alike(first, drawn(here, 2)) == {same}
    assert alike(first, first[1:]) == alike(first, drawn(here, 0, round_=1)) == {False}
    assert not torch.equal(first[0]["y"], drawn(here, 0, phase="both")[0]["y"]), "also in the first round of another phase"
    assert alike(first, drawn(here, 0)) == {True}, "also after another round"

# Ranges


@pytest.mark.parametrize("values", ["unit", "symmetric", "standard"])
@pytest.mark.parametrize(("generator", "settings", "stated"), CHOSEN)
def test_generators_learn_in_their_own_range_and_samples_come_in_the_classifiers(generator, settings, stated, values, monkeypatch):
    calls = watched(monkeypatch)
    found = went("gefl", generator, RESTS | settings, federation={"rounds": 1}, data={"normalization": values, "fraction": 0.1})
    targets, _, message, site = inside(found, "targets")
    low, high = RANGE[stated]
    x = torch.cat([batch["x"] for call in calls if call.phase == "generator" for client in call.before.clients for batch in call.batches(client)])
    assert float(x.min()) == pytest.approx(low, abs=1e-5) and float(x.max()) == pytest.approx(high, abs=1e-5)

    shard = site.holdings[0].train
    own, brightness = shard.pixels(), shard.images.double() / 255
    perfect = targets.space.from_images(message, own)                # what a generator would draw that knows its images by heart
    torch.testing.assert_close(perfect.double(), low + (high - low) * brightness, rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.space.to_classifier(perfect), own, rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.space.to_pictures(perfect).double(), brightness, rtol=0, atol=1e-6)
    batch = next(call for call in calls if call.phase == "targets" and 0 in call.before.clients).batches(0)[0]
    random = site.stream("synthetic/0", 0).torch()
    raw = targets.build_drawer(message, site)(torch.randint(CLASSES, batch["y"].shape, generator=random), random)
    black, white = (float(shard.scale(torch.full((1, 1, 8, 8), level, dtype=torch.uint8))[0, 0, 0, 0]) for level in (0, 255))
    x = batch["x"]
    torch.testing.assert_close(x.double(), black + (white - black) * (raw.double() - low) / (high - low), rtol=0, atol=1e-5)
    if generator in ("dcgan", "vtc"):                              # they end in tanh, the others may leave their range
        assert black - 1e-5 <= float(x.min()) < float(x.max()) <= white + 1e-5


@pytest.mark.parametrize("values", ["unit", "symmetric", "standard"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_the_papers_range_mode_leaves_samples_as_they_are_drawn(generator, values):
    targets = step(world(described("gefl", generator, {"range_mode": "paper"}, data={"normalization": values})), TrainTargets)
    samples = torch.linspace(-1.5, 2, 64).view(1, 1, 8, 8)
    assert targets.space.to_classifier(samples) is samples
    low, high = RANGE[STATED[generator]]
    np.testing.assert_allclose(targets.space.to_pictures(samples).numpy(), ((samples.numpy() - low) / (high - low)).clip(0, 1), atol=1e-6)

# What is drawn


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("generator", GENERATORS)
def test_a_whole_run_never_reads_the_official_test_set(name, generator, monkeypatch):
    def refuse(self):
        raise AssertionError("the official test set was read")
    monkeypatch.setattr(World, "test", property(refuse))
    assert finite(went(name, generator, federation={"rounds": 1}).states[-1].server)


@pytest.mark.parametrize("phase", ["generator", "targets"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_samples_to_look_at_are_images_of_each_class_beside_real_ones(generator, phase):
    found = went("gefl", generator, RESTS, federation={"rounds": 1})
    step_, group, message, site = inside(found, phase)
    images, has = step_.draw(group, message, site, 3)
    assert images.shape == (CLASSES, 3, 1, 8, 8) and has.tolist() == [True] * CLASSES
    assert float(images.min()) >= 0 and float(images.max()) <= 1 and len({bits({"": image})[""] for image in images.flatten(0, 1)}) == 3 * CLASSES
    assert torch.equal(images, step_.draw(group, message, site, 3)[0])
    shard = found.world.holdings[0].train
    torch.testing.assert_close(step_.seen(group, message, site, shard.pixels()).double(), shard.images.double() / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("generator", "rounds"), [("cvae", 8), ("dcgan", 8), ("ddpm", 8), ("vtc", 12)])
def test_a_generator_loses_less_on_images_it_was_trained_on_than_on_noise(generator, rounds):
    found = went("gefl", generator, {"generator_rounds": rounds, "generator_epochs": 2, "generator_lr": 3e-3, **RESTS}, federation={"clients": 1, "rounds": 1},
                 data={"partition": "iid", "fraction": 0.1})
    step_, group, message, site = inside(found, "generator")
    shard = found.world.holdings[0].train
    noise = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    members, others = (Shard(images, shard.labels[:60], shard.scale) for images in (shard.images[:60], noise))
    own, other = (step_.generator_losses(group, message, site, each) for each in (members, others))
    assert own.shape == other.shape == (60,) and own.dtype == torch.float64 and bool(own.isfinite().all())
    assert float((own < other).double().mean()) > 0.8
    assert torch.equal(own, step_.generator_losses(group, message, site, members)), "the same draws of noise each time"


@pytest.mark.parametrize("generator", GENERATORS)
def test_what_a_generator_thinks_of_an_image_depends_on_nobody_elses_noise(generator):
    step_, group, message, site = inside(went("gefl", generator, RESTS, federation={"clients": 1, "rounds": 1}), "generator")
    shard = site.holdings[0].train
    same = Shard(shard.images[:1].repeat(600, 1, 1, 1), shard.labels[:1].repeat(600), shard.scale)
    losses = step_.generator_losses(group, message, site, same)
    if generator == "dcgan":                                       # of its two players the one that sees data draws nothing
        torch.testing.assert_close(losses, losses[:1].expand(600))
    else:
        assert len(set(losses.tolist())) > 590

STEPS, BATCH, ROUNDS = 4, 16, 3
DDPM = {"generator": "ddpm", "generator_rounds": 1, "generator_epochs": 1, "steps": STEPS, "width": 8}
BALANCED = {"data": {"partition": "iid"}, "models": {"names": ["cnn1"]}}


# Sampling, compiled or not


def targets(settings, device="cpu", **run):
    """The step of the target rounds, its group and what that may see, in a federation of three clients with 71 or 72 images each."""
    described = in_memory.job("gefl", settings, run=run, federation={"rounds": ROUNDS}, **BALANCED)
    world = in_memory.world(described)
    step, place, group = in_memory.step(world, TrainTargets), schedule(world)[-1], world.join()[0]
    problem = replace(step.problem, device=torch.device(device))
    return world, TrainTargets(step.config, problem, step.space, step.continued), group, world.client_site(group, place.phase, place.round)


@pytest.mark.parametrize("settings, compile, wanted", [(DDPM, "on", True), (DDPM, "off", False), (DDPM, "auto", False), (DDPM | {"ddim_steps": 1}, "on", False),
                                                       ({"generator": "cvae", "generator_rounds": 1}, "on", False)],
                         ids=["asked for", "not wanted", "on a cpu", "one step", "one call"])
def test_only_what_samples_in_many_calls_is_compiled(settings, compile, wanted):
    _, step, group, site = targets(settings, compile=compile)
    assert step.draws_often(group, site) is wanted


def test_a_gpu_compiles_from_the_number_of_calls_in_the_whole_run_that_pays(monkeypatch):
    _, step, group, site = targets(DDPM, "cuda", compile="auto")
    images = int(site.sizes(group).max())
    calls = STEPS * (images // BATCH) * ROUNDS * len(group.clients)
    assert images // BATCH == 4 and len(group.clients) == 3
    for pays, wanted in ((calls, True), (calls + 1, False)):
        monkeypatch.setattr(compiling, "COMPILE_PAYS", pays)
        assert step.draws_often(group, site) is wanted


def test_clients_with_less_than_a_batch_still_draw_one(monkeypatch):
    _, step, group, site = targets(DDPM, "cuda", compile="auto")
    large = replace(step.problem.job, training=replace(step.problem.job.training, batch=1000))
    step = TrainTargets(step.config, replace(step.problem, job=large), step.space, step.continued)
    monkeypatch.setattr(compiling, "COMPILE_PAYS", STEPS * ROUNDS * len(group.clients))
    assert step.draws_often(group, site)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_samples_are_the_eager_ones_and_pictures_are_drawn_as_they_were(backend, compile_with, caplog):
    compile_with(backend)
    world, step, group, site = targets(DDPM, compile="on")
    message, y = world.found(), torch.arange(BATCH) % 10
    before = counters["stats"]["unique_graphs"]
    with inductor.patch(compile_threads=1):                        # starting workers takes longer than compiling
        eager, fast, again = (step.build_drawer(message, site, compile)(y, Stream(0, "sample").torch()) for compile in (False, True, True))
    graphs = counters["stats"]["unique_graphs"]
    pictures, has = step.draw(group, message, site, 2)
    compiling.compile_forward.cache_clear()
    torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, fast) and graphs == before + 1 == counters["stats"]["unique_graphs"]
    assert pictures.shape[:2] == (10, 2) and has.all() and not [record for record in caplog.records if record.name.startswith("hpcfl")]
