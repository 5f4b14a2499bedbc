"""GeFL and GeFL-F under bad settings and interruptions: refused by name, ended with the right exit code, resumed to the bit in any phase."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcfl import cli
from hpcfl.algorithms.gefl import TrainGenerator
from hpcfl.errors import DataError, JobError, NonFiniteError
from hpcfl.federation.state import schedule
from hpcfl.federation.world import World
from hpcfl.files import trees
from hpcfl.wire import communicator
from hpcfl.wire.communicator import Alone, Communicator
from tests.support.gefl_doubles import PLANS, described, went
from tests.support.in_memory import step, world
from tests.support.tiny_runs import apart, carry_out, checkpoint_of, left_half_written, outcome, tiny, undisturbed, write_job

ALL = {"every": 1, "keep": 100}
PHASES = {                                                         # jobs with at least two rounds in each of their phases
    "gefl": tiny("gefl, a gan that goes on training", algorithm={"generator_rounds": 4}, federation={"rounds": 4}, checkpoint=ALL),
    "gefl_f": tiny("gefl_f", algorithm={"generator": "vtc", "warmup_rounds": 2, "generator_rounds": 4, "continued_rounds": 2}, federation={"rounds": 4},
                   checkpoint=ALL)}
NETWORKS = {"gefl": {"generator", "discriminator"}, "gefl_f": {"generator"}}                        # that those train


# Settings and data that cannot work


@pytest.mark.parametrize("name", PLANS)
def test_a_class_that_nobody_has_is_refused_by_name(name):
    with pytest.raises(DataError, match=rf"{name} draws samples of all 10 classes, but no client has .* image of class 0, 3, 5, 8; raise data.fraction"):
        world(described(name, data={"fraction": 0.004, "partition": "iid"}))


def test_the_classes_named_are_those_that_all_clients_lack():
    generator, counts = step(world(described("gefl")), TrainGenerator), np.full((3, 10), 5)
    generator.accept(counts)
    counts[:2, 4] = 0
    generator.accept(counts)                                       # one client has it
    counts[2, 4] = counts[:, 9] = 0
    with pytest.raises(DataError, match="of class 4, 9; "):
        generator.accept(counts)


@pytest.mark.parametrize("name", PLANS)
def test_a_client_with_one_image_is_refused(name):
    with pytest.raises(DataError, match=r"client \d+ has 1 training image, a generator needs 2 for its norms; raise data.fraction or use fewer clients"):
        world(described(name, data={"fraction": 0.02, "partition": "iid"}, federation={"clients": 20}))


@pytest.mark.parametrize("name", PLANS)
def test_clients_with_two_images_each_are_enough(name):
    found = went(name, "cvae", federation={"clients": 10, "rounds": 1}, data={"fraction": 0.0142, "partition": "iid"})
    assert [len(part) for part in found.world.split.train] == [2] * 10 and len(found.places) > 2


@pytest.mark.parametrize(("settings", "training"), [({"generator_batch": 1}, {}), ({}, {"batch": 1})])
@pytest.mark.parametrize("name", PLANS)
def test_batches_of_one_image_are_refused(name, settings, training):
    with pytest.raises(JobError, match="trains the generator on batches of 1, its norms need 2; set algorithm.generator_batch to at least 2"):
        world(described(name, settings=settings, training=training))


@pytest.mark.parametrize("name", PLANS)
def test_blocks_of_more_architectures_than_clients_are_refused(name):
    with pytest.raises(JobError, match=r"M = 4 models.names .* K = 3 .*wanted K >= M"):
        world(described(name, models={"names": ["cnn1", "cnn2", "cnn3", "cnn4"], "assignment": "blocks"}))


@pytest.mark.parametrize("names", [["cnn1", "mlp2"], ["resnet8"]])
def test_models_without_a_common_extractor_are_refused_by_the_form_of_maps_alone(names):
    with pytest.raises(JobError, match=r"gefl_f averages 'extractor\.\*' over all clients, but of '\w+' that is empty|gefl_f averages .* of 'mlp2' that is"):
        world(described("gefl_f", models={"names": names}))
    world(described("gefl", models={"names": names}))


@pytest.mark.parametrize(("name", "generator", "size", "said"), [
    ("gefl", "cvae", 12, r"for images: Cvae: got data of \(1, 12, 12\), wanted .* power of two"),
    ("gefl", "dcgan", 4, r"for images: Dcgan: got data of \(1, 4, 4\), wanted .* power of two of at least 8"),
    ("gefl", "ddpm", 6, r"for images: Ddpm: got data of \(1, 6, 6\), wanted .* multiple of 4"),
    ("gefl_f", "cvae", 12, r"for maps of the common extractor: Cvae: got data of \(3, 6, 6\)"),
    ("gefl_f", "dcgan", 8, r"for maps of the common extractor: Dcgan: got data of \(3, 4, 4\)"),
    ("gefl_f", "ddpm", 12, r"for maps of the common extractor: Ddpm: got data of \(3, 6, 6\)")])
def test_sizes_that_a_generator_cannot_take_are_a_matter_of_the_job(name, generator, size, said):
    with pytest.raises(JobError, match=rf"algorithm.generator = '{generator}' {said}.*: resize the images \(data.image_size\)"):
        world(described(name, generator, data={"image_size": size}))


@pytest.mark.parametrize("width", ["width_g", "width_d"])
def test_odd_widths_of_a_gan_are_a_matter_of_the_job(width):
    with pytest.raises(JobError, match=rf"algorithm.generator = 'dcgan' for images: Dcgan: got .*{width} 5.*; wanted even numbers"):
        world(described("gefl", "dcgan", {width: 5}))


def test_a_latent_of_more_coefficients_than_there_are_is_a_matter_of_the_job():
    with pytest.raises(JobError, match="'vtc' for maps of the common extractor: Vtc: latent = 49 is too large; data of .* have 48"):
        world(described("gefl_f", "vtc", {"latent": 49}))


# Training that goes wrong


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("generator", ["cvae", "dcgan", "ddpm"])
def test_a_generator_that_is_not_finite_names_phase_round_and_client(name, generator):
    with pytest.raises(NonFiniteError, match=r"phase generator, round 0: training of client \d(, \d)* reached NaN or infinity"):
        went(name, generator, {"generator_lr": 1e30, "generator_batch": 8, "generator_rounds": 4})


def test_a_generator_that_goes_wrong_while_models_learn_names_that_phase(monkeypatch):
    batches = TrainGenerator.batches

    def poisoned(self, message, site, client, batch):
        for each in batches(self, message, site, client, batch):
            yield each | {"x": each["x"] / (0 if (client, site.phase, site.round) == (2, "both", 1) else 1)}
    monkeypatch.setattr(TrainGenerator, "batches", poisoned)
    with pytest.raises(NonFiniteError, match="phase both, round 1: training of client 2 reached NaN or infinity"):
        went("gefl", "vtc", {"continued_rounds": 2}, federation={"rounds": 2})


def test_a_generator_that_is_not_finite_ends_the_run_with_6_and_leaves_the_warm_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(communicator, "connect", lambda deterministic=False, **how: Communicator(Alone(), deterministic))
    job = tiny("gefl_f", algorithm={"generator": "vtc", "warmup_rounds": 2}, checkpoint=ALL)
    with undisturbed(), pytest.raises(SystemExit) as ended:
        cli.main(["run", str(write_job(tmp_path, job)), "--set", "algorithm.generator_lr=1e30", "--out", str(tmp_path / "run")])
    text = capsys.readouterr().err
    assert ended.value.code == 6 and "Traceback" not in text
    assert re.search(r"phase generator, round 0: training of client \d+(, \d+)* reached NaN or infinity in its loss or weights; lower the learning rate", text)
    assert (tmp_path / "run" / "LATEST").read_text() == "round-000002\n" and not left_half_written(tmp_path / "run")
    carry_out(job, tmp_path / "run", may_differ=["algorithm.generator_lr"])
    assert not apart(outcome(tmp_path / "run"), outcome(carry_out(job, tmp_path / "never wrong")))


# Interruptions


@pytest.fixture(scope="module", params=PLANS)
def whole(request, tmp_path_factory) -> tuple[str, Path]:
    """A run of each plan that nobody interrupted, with a checkpoint after every round."""
    return request.param, carry_out(PHASES[request.param], tmp_path_factory.mktemp("whole") / "run")


def test_resumed_inside_any_phase_a_run_ends_as_the_uninterrupted_one(whole, tmp_path):
    name, folder = whole
    places = schedule(World(PHASES[name], Communicator(Alone()), torch.device("cpu")))
    inside = {place.phase.name: place.row + 1 for place in places if place.round == 0 and not place.last}
    assert list(inside) == [*(["warmup"] if name == "gefl_f" else []), "generator", "both", "targets"]
    for phase, rows in inside.items():
        resumed = carry_out(PHASES[name], tmp_path / phase, resume=checkpoint_of(folder, rows))
        found = apart(outcome(resumed), outcome(folder))
        assert not found, "\n".join([f"resumed inside {phase}:", *found])


def test_checkpoints_hold_moments_while_a_generator_trains_and_drop_those_of_clients_that_learn_from_it_at_rest(whole):
    name, folder = whole
    built = World(PHASES[name], Communicator(Alone()), torch.device("cpu"))
    trained: set[int] = set()
    for place in schedule(built):
        cohort = set(built.cohort(place.phase, place.row))
        trained = trained | cohort if place.phase.name in ("generator", "both") else trained - cohort
        states = trees.read_trees(checkpoint_of(folder, place.row + 1) / "rank-0000.h5")
        for client, state in states.items():
            moments = {path.split("/")[1] for path, leaf in state.items() if path.startswith("optimizer/") and leaf.any()}
            assert moments == (NETWORKS[name] if int(client) in trained else set()), (place.phase.name, client)
        assert {int(client) for client in states} == set(range(built.clients)) and not [path for path in trees.read_trees(
            checkpoint_of(folder, place.row + 1) / "server.h5")["server"] if "optimizer" in path]
