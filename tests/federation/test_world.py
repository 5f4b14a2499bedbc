"""The world seen from one rank: its own clients' images and nobody else's, and everything else a pure function of the job."""
import sys
from collections import Counter
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpcfl.contract import ClientSite, Holdings, Phase, Problem, ServerSite
from hpcfl.data.shards import iterate_epochs
from hpcfl.errors import DataError, JobError, NonFiniteError
from hpcfl.federation.ledger import Ledger
from hpcfl.federation.world import World
from hpcfl.latents.announced import AnnouncedGaussians
from hpcfl.runs.choices import CHOICES
from hpcfl.settings.job import resolve
from hpcfl.training.losses import cross_entropy
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn
from tests.support.in_memory import bits, job, run, world
from tests.support.tiny_runs import tiny

SEVEN = {"clients": 7, "rounds": 2, "participation": 0.5}


def seen_from(rank: int, ranks: int, **sections) -> World:
    """The world of one rank of several; nothing is exchanged."""
    comm = SimpleNamespace(rank=rank, size=ranks, is_server=rank == 0, spread=None)
    return World(job("fedavg", **({"federation": SEVEN} | sections)), comm, torch.device("cpu"))


def reading(observed: World) -> list[int]:
    """The training images that the world reads from now on."""
    read, indices = observed.corpus.read, []

    def watched(part: str, wanted: np.ndarray | None) -> np.ndarray:
        assert part == "train" and wanted is not None, "all images of a part were read at once"
        indices.extend(int(index) for index in wanted)
        return read(part, wanted)
    observed.corpus = replace(observed.corpus, read=watched)
    return indices


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_rank_reads_only_the_images_of_its_own_clients_and_each_once(ranks):
    for rank in range(ranks):
        observed = seen_from(rank, ranks)
        indices = reading(observed)
        groups = observed.join()
        split = observed.split
        own = np.concatenate([part[client] for part in (split.train, split.validation, split.test) for client in observed.mine])
        assert sorted(indices) == sorted(own.tolist())
        assert sorted(client for group in groups for client in group.clients) == list(observed.mine)


def test_a_shard_holds_the_images_of_its_indices():
    observed = seen_from(1, 2)
    for client in observed.mine:
        train = observed.holdings[client].train
        assert torch.equal(train.images, torch.from_numpy(observed.corpus.train_images(observed.split.train[client])))
        assert train.labels.tolist() == observed.corpus.train_labels[observed.split.train[client]].tolist()


def test_every_client_lives_on_exactly_one_rank_and_all_ranks_agree_where():
    worlds = [seen_from(rank, 3) for rank in range(3)]
    assert sorted(client for each in worlds for client in each.mine) == list(range(7))
    assert len({each.home for each in worlds}) == 1
    for part in ("train", "validation", "test"):
        assert all(np.array_equal(a, b) for each in worlds for a, b in zip(getattr(each.split, part), getattr(worlds[0].split, part), strict=True))


def test_a_dedicated_server_hosts_and_reads_nothing():
    observed = seen_from(0, 3, federation=SEVEN | {"server_rank": "dedicated"})
    indices = reading(observed)
    assert observed.mine == () and observed.join() == [] and dict(observed.modules) == {} and indices == []


def test_every_rank_can_take_a_share_of_the_servers_work_and_no_client_sees_the_public_images():
    data = {"public_fraction": 0.2, "validation_fraction": 0.1}
    phase, sites = Phase("rounds", 1, ()), []
    for rank in range(2):
        observed = seen_from(rank, 2, data=data)
        indices = reading(observed)
        sites.append(observed.server_site(phase, 0, Ledger(observed.problem.device)))
        split = observed.split
        assert sorted(indices) == sorted([*split.public, *split.public_validation]) and not set(indices) & {index for part in split.train for index in part}
        assert len(sites[-1].public) == len(split.public) > 0 and len(sites[-1].public_validation) == len(split.public_validation) > 0
    assert all(torch.equal(getattr(sites[0], name).images, getattr(sites[1], name).images) for name in ("public", "public_validation"))
    private = seen_from(0, 2, data={"public_fraction": 0.0})
    indices = reading(private)
    assert private.server_site(phase, 0, Ledger(private.problem.device)).public is None and indices == []


def test_a_site_shows_the_groups_own_clients_and_no_others():
    observed = seen_from(0, 1)
    group = observed.join()[0].select([1, 5])
    site = observed.client_site(group, Phase("rounds", 1, ()), 0)
    assert set(site.holdings) == {1, 5}
    types = {entry.type for kind in (ClientSite, ServerSite, Problem) for entry in fields(kind)}
    assert not any("World" in str(each) or "Communicator" in str(each) or "Corpus" in str(each) for each in types)


def test_cohorts_follow_from_the_seed_and_the_row_alone():
    phase, rows = Phase("rounds", 9, ()), range(30)
    one, other = (seen_from(rank, ranks) for rank, ranks in ((0, 1), (2, 3)))
    cohorts = [one.cohort(phase, row) for row in rows]
    assert cohorts == [other.cohort(Phase("another", 9, ()), row) for row in rows]
    assert [one.cohort(phase, row) for row in reversed(rows)] == cohorts[::-1]
    assert all(len(set(cohort)) == 4 and list(cohort) == sorted(cohort) and set(cohort) <= set(range(7)) for cohort in cohorts)
    assert len(set(cohorts)) > 10 and set().union(*cohorts) == set(range(7))
    assert cohorts != [seen_from(0, 1, run={"device": "cpu", "seed": 1}).cohort(phase, row) for row in rows]


@pytest.mark.parametrize("participation, size", [(1.0, 7), (0.01, 1), (0.5, 4), (0.3, 2)])
def test_the_cohort_has_its_share_and_at_least_one_client(participation, size):
    observed = seen_from(0, 1, federation=SEVEN | {"participation": participation})
    assert len(observed.cohort(Phase("rounds", 1, ()), 0)) == size
    assert len(observed.cohort(Phase("all", 1, (), everyone=True), 0)) == 7


def test_architectures_go_round_and_group_the_clients():
    observed = seen_from(0, 1, models={"names": ["mlp2", "cnn1", "mlp3"]})
    assert observed.problem.architectures == ("mlp2", "cnn1", "mlp3", "mlp2", "cnn1", "mlp3", "mlp2")
    assert observed.architectures([6, 1, 0, 3]) == {"cnn1": (1,), "mlp2": (0, 3, 6)}
    assert [(group.architecture, group.clients) for group in observed.join()] == [("cnn1", (1, 4)), ("mlp2", (0, 3, 6)), ("mlp3", (2, 5))]


def test_widths_of_one_model_are_architectures_of_their_own():
    observed = seen_from(0, 1, models={"names": ["cnn1@0.5", "cnn1"]})
    half, whole = observed.join()[::-1]
    assert (half.architecture, whole.architecture) == ("cnn1@0.5", "cnn1")
    assert half.part("model")["body.conv1.weight"].shape[1] == 8 and whole.part("model")["body.conv1.weight"].shape[1] == 16
    with pytest.raises(JobError, match="'cnn1@2' has width '2'"):
        seen_from(0, 1, models={"names": ["cnn1@2"]})


def test_the_server_trains_on_public_images_by_the_same_loop_as_a_client():
    observed = seen_from(0, 1, data={"public_fraction": 0.2})
    phase, public = Phase("rounds", 1, ()), observed.public[0]
    group, turn = observed.join()[0].select([1]), Turn(("model",), cross_entropy, Optimizer("sgd", 0.1))
    server, modules = observed.server_site(phase, 0, Ledger(observed.problem.device)), observed.modules[group.architecture]
    client = replace(observed.client_site(group, phase, 0), holdings={1: Holdings(public, public)})
    trained, metrics = server.fit(group, modules, [turn], lambda model: iterate_epochs(server.public, 16, 1, server.stream("batches")))
    same, _ = client.fit(group, [turn], lambda model: iterate_epochs(public, 16, 1, server.stream("batches")))
    assert bits(trained.state) == bits(same.state) != bits(group.state) and metrics["loss"].shape == (1,)
    poison = Turn(("model",), lambda modules, batch, context: cross_entropy(modules, batch, context) * float("nan"), Optimizer("sgd", 0.1))
    with pytest.raises(NonFiniteError, match="server, phase rounds, round 0"):
        server.fit(group, modules, [poison], lambda model: iterate_epochs(server.public, 16, 1, server.stream("batches")))


def test_a_client_starts_from_the_same_model_on_any_rank():
    alone = {client: state for group in seen_from(0, 1, models={"names": ["mlp2"]}).join() for client, state in group.states().items()}
    apart = {client: state for rank in range(3) for group in seen_from(rank, 3, models={"names": ["mlp2"]}).join() for client, state in group.states().items()}
    assert apart.keys() == alone.keys() == set(range(7))
    assert all(torch.equal(apart[client][path], alone[client][path]) for client in alone for path in alone[client])
    assert not torch.equal(alone[0]["model/head.weight"], alone[1]["model/head.weight"])


def test_placement_weighs_images_and_architectures():
    observed = seen_from(0, 2, models={"names": ["mlp2", "resnet8"], "feature_size": 6}, federation={"clients": 4}, data={"partition": "iid"})
    assert {observed.home[1], observed.home[3]} == {0, 1}, "the two dear clients share a rank"


def test_standard_values_are_the_same_on_every_rank():
    scales = [seen_from(rank, 2, data={"normalization": "standard"}).problem.scale for rank in (0, 1)]
    assert scales[0] == scales[1] and len(scales[0].mean) == 1


def test_images_are_as_large_as_the_job_wants():
    observed = seen_from(0, 1, data={"image_size": 16})
    assert observed.problem.shape == (1, 16, 16) and observed.holdings[0].train.pixels(slice(0, 2)).shape == (2, 1, 16, 16)


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(JobError, match="'cnn11' is not in the zoo; did you mean 'cnn1"):
        seen_from(0, 1, models={"names": ["cnn11"]})


@pytest.mark.parametrize("server", ["shared", "dedicated"])
def test_the_number_of_clients_does_not_follow_the_ranks(server):
    left_open = {"federation": {"rounds": 1, "server_rank": server}}
    worlds = [World(resolve({"algorithm": {"name": "fedavg"}} | left_open, CHOICES), SimpleNamespace(rank=0, size=ranks, is_server=True, spread=None),
                    torch.device("cpu")) for ranks in (1, 2, 3)]
    assert [observed.clients for observed in worlds] == [10] * 3
    assert all(np.array_equal(mine, first) for observed in worlds for mine, first in zip(observed.split.train, worlds[0].split.train, strict=True))


def test_the_plan_is_in_the_world():
    assert [phase.name for phase in world(job("fedavg")).plan] == ["rounds"]


NORMED = {"models": {"names": ["mlp2", "cnn8_bn"]}}                # cnn8 has halved images of 8x8 to one pixel before its last norms


def test_batches_of_one_image_are_refused_where_a_norm_needs_two():
    with pytest.raises(JobError, match="training.batch = 1 trains 'cnn8_bn' on single images.*models.norm = 'group', or training.batch to at least 2"):
        world(job("fedavg", training={"batch": 1}, **NORMED))
    world(job("fedavg", training={"batch": 1}))
    world(job("fedavg", training={"batch": 1}, models=NORMED["models"] | {"norm": "group"}))


def test_a_client_with_one_image_is_refused_where_a_norm_needs_two():
    few = {"data": {"partition": "iid", "fraction": 0.003}, "federation": {"clients": 4}}
    with pytest.raises(DataError, match=r"client \d has 1 training image and trains 'cnn8_bn' on single images.*raise data.fraction"):
        world(job("fedavg", **few, **NORMED))
    world(job("fedavg", **few))


# Structures

@pytest.mark.parametrize("case", ["fedconv", "feddf", "avgkd", "fedrolex", "fml", "gefl_f"])
def test_a_structure_is_built_once_for_everybody_and_nobody_leaves_anything_in_it(case, monkeypatch):
    built, model = Counter(), Problem.model

    def counted(problem, architecture):
        built[architecture, sys._getframe(1).f_code.co_name] += 1
        return model(problem, architecture)
    monkeypatch.setattr(Problem, "model", counted)
    found = world(tiny(case, data={"validation_fraction": 0.2}, federation={"clients": 4, "rounds": 2, "participation": 1.0}))
    run(found)
    structures = found.problem.structures
    assert structures and {count for (_, who), count in built.items() if who == "structure"} == {1}
    for architecture, used in structures.items():
        with found.problem.stream("structure").seeding():
            new = model(found.problem, architecture)
        assert bits(used.state_dict()) == bits(new.state_dict()), architecture
        assert all(layer.training and not layer._forward_hooks for layer in used.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in used.parameters())


def test_the_networks_of_a_group_are_its_own():
    found = world(job("fedavg"))
    for architecture, networks in found.modules.items():
        networks["model"].requires_grad_(False).eval()
        assert found.problem.structure(architecture).training
        assert all(parameter.requires_grad for parameter in found.problem.structure(architecture).parameters())


def test_a_message_is_read_once_for_all_groups_and_chunks(monkeypatch):
    """Four clients, each in a chunk of its own: two rounds of learning, and one of fine-tuning."""
    read, of = [], AnnouncedGaussians.from_message.__func__
    monkeypatch.setattr(AnnouncedGaussians, "of", classmethod(lambda cls, message, *rest: read.append(message) or of(cls, message, *rest)))
    found = run(world(job("fedvtc", {"finetune_epochs": 1, "per_class": 2, "vtc_steps": 1}, residency={"chunk": 1}, federation={"clients": 4, "rounds": 2})))
    assert len(found.places) == 3 and len(read) == 3
