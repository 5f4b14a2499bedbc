"""GeFL-F beyond GeFL: the common extractor that freezes after its warm-up, maps in the place of images, headers, and what crosses the wire."""
import functools

import pytest
import torch
import torch.nn.functional as F

from hpcfl import tree
from hpcfl.algorithms.gefl_f import Maps, TrainHeaders
from hpcfl.contract import Phase
from hpcfl.data.augment import Augmentation
from hpcfl.data.shards import Shard, iterate_epochs
from hpcfl.models import zoo
from hpcfl.training.evaluate import bind_model
from hpcfl.tree import Tree
from tests.support.gefl_doubles import (
    CLASSES,
    CLIENTS,
    FEATURES,
    GENERATORS,
    booked,
    classifier,
    inside,
    mean,
    norms,
    phase_of,
    rows_of,
    scalars,
    watched,
    went,
)
from tests.support.in_memory import Run, bits, job, run, step, world

BOTH = {"warmup_rounds": 2, "generator_rounds": 3, "continued_rounds": 1}
CASES = {"headers with and without norms": {}, "headers with norms": {"models": {"names": ["cnn1_bn", "cnn5_bn"]}},
         "augmented": {"training": {"augment": ["crop_flip", "mixup"]}}, "momentum and decay": {"training": {"momentum": 0.9, "weight_decay": 0.01}},
         "some sit out": {"federation": {"participation": 0.67}}}


def extractor(model: Tree) -> Tree:
    return {path: leaf for path, leaf in model.items() if path.startswith("extractor.")}


def header(model: Tree) -> Tree:
    return {path: leaf for path, leaf in model.items() if not path.startswith("extractor.")}


def frozen(found: Run, architecture: str = "cnn1") -> torch.nn.Module:
    """A model of the zoo with the extractor of the run's end, in float64 and eval mode; its header means nothing."""
    with found.world.problem.stream("test").seeding():
        model = zoo.build(architecture, found.world.problem.shape, CLASSES, FEATURES)
    model.load_state_dict(tree.part(found.states[-1].server, "common"), strict=False)
    return model.double().eval().requires_grad_(False)


@functools.cache
def cvae() -> Run:
    """A run that tests share; they must not change it."""
    return went("gefl_f", "cvae", BOTH)


# The extractor


@pytest.mark.parametrize("case", CASES)
def test_after_its_warm_up_the_extractor_stays_to_the_bit_while_headers_learn(case):
    found = went("gefl_f", "vtc", BOTH | {"pool": "round"}, **CASES[case])
    end = rows_of(found, "warmup")[-1]
    wanted = bits(tree.part(found.states[end].server, "common"))
    assert any("running_var" in path for path in wanted) and wanted != bits(tree.part(found.states[0].server, "common"))
    for row in range(end, len(found.states)):
        assert bits(tree.part(found.states[row].server, "common")) == wanted
    for row in rows_of(found, "both") + rows_of(found, "targets"):
        place = found.places[row - 1]
        for client in found.world.cohort(place.phase, place.row):
            own, before = (tree.part(found.state(client, position), "model") for position in (row, row - 1))
            assert bits(extractor(own)) == wanted
            learned = tree.select_floating({path: leaf for path, leaf in header(own).items() if not torch.equal(leaf, before[path])})
            assert learned.keys() == tree.select_floating(header(own)).keys(), "every weight and running statistic of a header moves"


def test_all_models_have_the_warmed_up_extractor():
    found = cvae()
    headers = step(found.world, TrainHeaders)
    whole = headers.global_models(headers.publish(found.states[-1].server))
    assert set(whole) == {"cnn1", "cnn2_bn"} and len({tuple(bits(extractor(model)).items()) for _, model in whole.values()}) == 1
    for name, (architecture, model) in whole.items():
        assert model.keys() == found.world.problem.model(architecture).state_dict().keys()
        clients = [client for client in range(CLIENTS) if found.world.problem.architectures[client] == name]
        assert all(bits(tree.part(found.state(client), "model")) == bits(model) for client in clients)


def test_the_warm_up_is_lg_fedavg_to_the_bit():
    found, plain = went("gefl_f", "vtc", {"warmup_rounds": 2}), world(job("lg_fedavg", federation={"rounds": 2}))
    plain.plan = (Phase("warmup", 2, plain.plan[0].steps),)        # the phase's name is part of every stream's
    alone = run(plain)
    for row in rows_of(found, "warmup"):
        state = found.states[row].server
        assert bits({path: leaf for path, leaf in state.items() if not path.startswith("generator/")}) == bits(alone.states[row].server)
        assert all(bits(found.state(client, row)) == bits(alone.state(client, row)) for client in range(CLIENTS))


def test_headers_start_from_their_weights_of_the_warm_up(monkeypatch):
    calls = watched(monkeypatch)
    found = went("gefl_f", "vtc", {"warmup_rounds": 2})
    warm = found.states[rows_of(found, "warmup")[-1]]
    first = {client: call.before for call in reversed(calls) if (call.phase, call.round) == ("targets", 0) for client in call.before.clients}
    for client in range(CLIENTS):
        group = first[client].select([client])
        assert bits(tree.row(group.part("model"), 0)) == bits(tree.part(found.state(client, rows_of(found, "warmup")[-1]), "model"))
        assert bits(header(tree.row(group.part("model"), 0))) == bits(tree.part(warm.server, group.architecture))


# Maps


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_generator_learns_from_maps_of_the_frozen_extractor_in_eval_mode(generator, monkeypatch):
    calls = watched(monkeypatch)
    found = went("gefl_f", generator, {"continued_rounds": 1}, federation={"rounds": 1})
    model = frozen(found)
    seen = 0
    for call in calls:
        if "generator" in call.trains:
            for client in call.before.clients:
                shard = found.world.holdings[client].train
                for own in call.batches(client):
                    want = model.extractor(shard.pixels().double())
                    nearest = torch.cdist(own["x"].flatten(1).double(), want.flatten(1)).min(1)
                    assert float(nearest.values.max()) < 1e-3 and torch.equal(shard.labels[nearest.indices], own["y"])
                    seen += len(own["y"])
    assert seen == 2 * sum(map(len, found.world.split.train)), "each image once per generator round, in both phases"


def test_maps_are_made_once_for_all_phases(monkeypatch):
    made, extractor_of = [], Maps.extractor

    def counted(self, message):
        extract = extractor_of(self, message)

        def count(x):
            made.append(len(x))
            return extract(x)
        return count
    monkeypatch.setattr(Maps, "extractor", counted)
    found = went("gefl_f", "vtc", BOTH)
    assert sum(made) == sum(map(len, found.world.split.train))


def test_augmented_images_go_through_the_extractor_anew_and_samples_are_not_augmented(monkeypatch):
    calls = watched(monkeypatch)
    found = went("gefl_f", "vtc", training={"augment": ["crop_flip"], "epochs": 2}, federation={"rounds": 1})
    own = [call for call in calls if call.phase == "targets"][1]
    client, model = own.before.clients[0], frozen(found)
    site = found.world.client_site(own.before, phase_of(found, "targets"), 0)
    images = list(site.epochs(client, 2, 16, found.world.problem.augmentation()))
    plain = torch.cat([batch["x"] for batch in site.epochs(client, 2, 16)])
    assert not torch.equal(torch.cat([batch["x"] for batch in images]), plain)
    for got, image in zip(own.batches(client), images, strict=True):
        torch.testing.assert_close(got["x"].double(), model.extractor(image["x"].double()), rtol=1e-4, atol=1e-5)
        assert torch.equal(got["y"], image["y"])


def test_the_generator_learns_from_maps_of_augmented_images_that_are_never_mixed(monkeypatch):
    calls = watched(monkeypatch)
    found = went("gefl_f", "vtc", {"warmup_rounds": 1, "generator_epochs": 2}, training={"augment": ["crop_flip", "mixup"]}, federation={"rounds": 1})
    own = next(call for call in calls if call.phase == "generator")
    client, model, batch = own.before.clients[0], frozen(found), found.world.job.training.batch
    site = found.world.client_site(own.before, phase_of(found, "generator"), 0)
    images = iterate_epochs(site.holdings[client].train, batch, 2, site.stream("generator batches", client), Augmentation(("crop_flip",)))
    for got, image in zip(own.batches(client), images, strict=True):
        torch.testing.assert_close(got["x"].double(), model.extractor(image["x"].double()), rtol=1e-4, atol=1e-5)
        assert torch.equal(got["y"], image["y"])


# Headers


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.05}])
def test_without_samples_a_header_learns_as_by_torchs_sgd_on_frozen_maps_and_is_averaged_by_images(settings, monkeypatch):
    calls = watched(monkeypatch)
    found = went("gefl_f", "vtc", {"synthetic_epochs": 0}, training={"lr": 0.05, "epochs": 2, **settings})
    start, end = rows_of(found, "targets")[0] - 1, rows_of(found, "targets")[0]
    trained: dict[int, Tree] = {}
    for call in [call for call in calls if (call.phase, call.round) == ("targets", 0)]:
        for client in call.before.clients:
            model = frozen(found, call.before.architecture)
            model.load_state_dict(tree.part(found.states[start].server, call.before.architecture), strict=False)
            shard = found.world.holdings[client].train
            parts = torch.nn.ModuleList([model.body, model.projection, model.activation, model.head]).train().requires_grad_(True)
            sgd = torch.optim.SGD(parts.parameters(), lr=0.05, **settings)
            for batch in call.batches(client):
                maps = model.extractor(shard.pixels(batch["index"]).double())
                sgd.zero_grad()
                F.cross_entropy(model.header(maps), batch["y"]).backward()
                sgd.step()
            trained[client] = header(tree.select_floating(model.state_dict()))
            got = tree.part(call.after.states()[client], "model")
            for path, leaf in trained[client].items():
                torch.testing.assert_close(got[path].double(), leaf.detach(), rtol=1e-3, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")
    assert sorted(trained) == list(range(CLIENTS))
    for name in ("cnn1", "cnn2_bn"):
        clients = [client for client in range(CLIENTS) if found.world.problem.architectures[client] == name]
        sizes = torch.tensor([len(found.world.split.train[client]) for client in clients])
        for path, leaf in tree.select_floating(tree.part(found.states[end].server, name)).items():
            want = mean(torch.stack([trained[client][path].detach() for client in clients]), sizes)
            torch.testing.assert_close(leaf.double(), want, rtol=1e-3, atol=1e-5)


def test_evaluation_of_a_client_is_extractor_and_header_together():
    found = cvae()
    group = next(group for group in found.states[-1].groups if 0 in group.clients)
    x, model = found.world.test.pixels(slice(0, 20)), frozen(found, group.architecture)
    model.load_state_dict(tree.part(found.states[-1].server, group.architecture), strict=False)
    got = bind_model(group, found.world.modules[group.architecture], 0)(x)
    torch.testing.assert_close(got.double(), model.header(model.extractor(x.double())), rtol=1e-4, atol=1e-5)


# Bytes


@pytest.mark.parametrize(("generator", "weights"), [("cvae", "clients"), ("dcgan", "clients"), ("vtc", "images")])
def test_bytes_of_a_whole_run_are_those_of_the_specification(generator, weights):
    """Beyond 2.3 the simulator counts, per client: the last average of its header, which it holds at the end; the batch counters of norms (8 bytes each)
    with every download of extractor and header; n_k (8 bytes) once per warm-up and target round, and per generator round where it weighs the generator."""
    fe, ka, tn = 2, 4, 3
    found = went("gefl_f", generator, {"warmup_rounds": fe, "generator_rounds": ka, "generator_weights": weights}, federation={"rounds": tn})
    networks = phase_of(found, "generator").steps[0].initialise("test")
    g, w = scalars(networks["generator"]), sum(map(scalars, networks.values()))
    counted = 8 * (ka if weights == "images" else 0)
    for client in range(CLIENTS):
        model = classifier(found, client)
        f, h = scalars(model.extractor), scalars(model) - scalars(model.extractor)
        of_f, of_h = 8 * len(norms(model.extractor)), 8 * (len(norms(model)) - len(norms(model.extractor)))
        down, up = sum(booked(found, client, "down")), sum(booked(found, client, "up"))
        assert up == 4 * (fe * (f + h) + ka * w + tn * h) + 8 * (fe + tn) + counted
        assert down == 4 * (fe * (f + h) + f + ka * w + g + tn * h) + 4 * h + of_f * (fe + 1) + of_h * (fe + 1 + tn)
        specification = 2 * 4 * fe * (f + h) + 4 * f + 2 * 4 * ka * w + 4 * g + 2 * 4 * tn * h
        assert down + up - specification == 4 * h + of_f * (fe + 1) + of_h * (fe + 1 + tn) + 8 * (fe + tn) + counted


def test_extractor_and_frozen_generator_are_sent_once_and_headers_alone_come_up():
    found = went("gefl_f", "cvae", {"generator_rounds": 3, "continued_rounds": 1})
    networks = phase_of(found, "generator").steps[0].initialise("test")
    g, w = 4 * scalars(networks["generator"]), 4 * sum(map(scalars, networks.values()))
    for client in range(CLIENTS):
        model = classifier(found, client)
        whole, f = ((4 * scalars(module), 8 * len(norms(module))) for module in (model, model.extractor))
        h = sum(whole) - sum(f)
        assert [place.phase.name for place in found.places] == ["warmup", "generator", "generator", "both", "targets", "targets"]
        assert booked(found, client, "down") == [2 * sum(whole), w, w, w + h, g + h, h]
        assert booked(found, client, "up") == [whole[0] + 8, w, w, w + whole[0] - f[0] + 8, whole[0] - f[0] + 8, whole[0] - f[0] + 8]


# What is drawn


@pytest.mark.parametrize("phase", ["generator", "targets"])
def test_samples_to_look_at_are_maps_as_the_extractor_makes_them_of_images(phase):
    found = cvae()
    step_, group, message, site = inside(found, phase)
    maps, has = step_.draw(group, message, site, 3)
    assert maps.shape == (CLASSES, 3, *step_.generative.shape) == (CLASSES, 3, 3, 4, 4) and has.tolist() == [True] * CLASSES
    assert torch.equal(maps, step_.draw(group, message, site, 3)[0]) and float(maps.min()) >= 0
    x = found.world.holdings[0].train.pixels()
    torch.testing.assert_close(step_.seen(group, message, site, x).double(), frozen(found).extractor(x.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("generator", ["cvae", "ddpm", "vtc"])
def test_a_generator_of_maps_loses_less_on_those_of_training_images_than_on_those_of_noise(generator):
    found = went("gefl_f", generator, {"generator_rounds": 10, "generator_epochs": 2, "generator_lr": 3e-3, "warmup_rounds": 3},
                 federation={"clients": 1, "rounds": 1}, data={"partition": "iid", "fraction": 0.1})
    step_, group, message, site = inside(found, "generator")
    shard = found.world.holdings[0].train
    noise = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    own, other = (step_.generator_losses(group, message, site, Shard(images, shard.labels[:60], shard.scale)) for images in (shard.images[:60], noise))
    assert own.shape == (60,) and own.dtype == torch.float64 and float((own < other).double().mean()) > 0.8
