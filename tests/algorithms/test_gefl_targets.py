"""What the clients of GeFL and GeFL-F learn from: samples before images, in the classifier's range; and what a generator shows of itself."""
import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.algorithms.gefl import TrainTargets
from hpcfl.contract import Phase
from hpcfl.data.shards import Shard
from hpcfl.federation.world import World
from tests.support.gefl_doubles import CLASSES, CLIENTS, GENERATORS, PLANS, described, inside, phase_of, rows_of, watched, went
from tests.support.in_memory import bits, finite, job, run, step, world

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
    shape = phase_of(found, "targets").steps[0].kind.shape
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
    labels = torch.cat([batch["y"] for batch in targets.synthetic(draw, site, 0)])
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
        return list(targets.synthetic(targets.build_drawer(message, site), site, client))

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
