"""FedDF: the ensemble and the loss in NumPy, when distillation ends and what is kept, and that nobody reads the labels of public images."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.algorithms import feddf
from hpcfl.algorithms.feddf import FedDF
from hpcfl.contract import ClientSite
from hpcfl.errors import JobError
from hpcfl.federation.ledger import Ledger
from hpcfl.training.evaluate import bind
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Modules, Turn
from hpcfl.tree import Tree
from tests.support.baselines import CLASSES, CLIENTS, FOUR, PUBLIC, built, images, kl, models, softmax, went
from tests.support.in_memory import Run, bits, finite, job, run, step, world


def distilled(settings=None, **sections) -> tuple[Run, list[dict[int, Tree]]]:
    """A run of FedDF, and what its server gave to be distilled in each round."""
    items, distil = [], FedDF.distil

    def watched(self, share, site):
        items.append({index: tree.clone(item) for index, item in share.items()})
        return distil(self, share, site)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedDF, "distil", watched)
        return went("feddf", settings, **sections), items


@pytest.mark.parametrize("ensemble", ["logits", "probabilities"])
@pytest.mark.parametrize("teachers", ["clients", "architectures"])
def test_the_ensemble_of_feddf_is_that_of_its_teachers(teachers, ensemble):
    before: list[dict[int, Tree]] = []
    train_model = ClientSite.train_model

    def watched(self, group, *arguments, **options):
        trained, metrics = train_model(self, group, *arguments, **options)
        before.append(models(trained.states()))
        return trained, metrics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientSite, "train_model", watched)
        found, items = distilled({"teachers": teachers, "ensemble": ensemble}, federation=FOUR | {"rounds": 1})
    public, problem = found.world.public, found.world.problem
    states = [(problem.architectures[client], own) for group in before for client, own in group.items()]
    if teachers == "architectures":
        states = [(name, tree.part(items[0][index], "model")) for index, name in enumerate(problem.sizes.every)]
    for part, shard in zip(("public", "held_out"), public, strict=True):
        logits = np.stack([bind(problem.structure(name), own)(shard.pixels()).double().numpy() for name, own in states])
        assert len(logits) == (CLIENTS if teachers == "clients" else 2) and len(shard)
        want = softmax(logits.mean(0)) if ensemble == "logits" else softmax(logits).mean(0)
        for item in items[0].values():
            np.testing.assert_allclose(np.exp(item[f"teacher/{part}"].double().numpy()), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("teachers", ["clients", "architectures"])
def test_what_feddf_distils_into_is_the_average_of_fedavg(teachers):
    (found, items), plain = distilled({"teachers": teachers}), went("fedavg", data=PUBLIC)
    for index, name in enumerate(found.world.problem.sizes.every):
        assert bits(tree.part(items[0][index], "model")) == bits(tree.part(plain.states[1].server, name))


def test_teachers_are_the_same_models_where_each_architecture_has_one_client():
    two = {"federation": {"clients": 2, "rounds": 1}}
    clients, architectures = (went("feddf", {"teachers": teachers}, **two) for teachers in ("clients", "architectures"))
    assert bits(clients.states[-1].server) == bits(architectures.states[-1].server)
    assert clients.accounts[0]["up"] == architectures.accounts[0]["up"]


def test_the_labels_of_the_public_images_are_never_looked_at():
    right, wrong = (world(job("feddf", {"steps": 6, "stage": 2})) for _ in range(2))
    wrong.public = tuple(replace(shard, labels=(shard.labels + 3) % CLASSES) for shard in wrong.public)
    assert bits(run(right).states[-1].server) == bits(run(wrong).states[-1].server)


def test_distillation_brings_every_average_nearer_to_the_ensemble_on_what_is_held_out():
    found, items = distilled({"steps": 40, "stage": 10, "lr": 0.01}, federation=FOUR | {"rounds": 1}, data=PUBLIC | {"fraction": 0.3})
    for index, name in enumerate(found.world.problem.sizes.every):
        held_out, teacher = found.world.public[1], np.exp(items[0][index]["teacher/held_out"].double().numpy())
        start, end = (kl(teacher, softmax(bind(found.world.problem.structure(name), state)(held_out.pixels()).double().numpy()))
                      for state in (tree.part(items[0][index], "model"), tree.part(found.states[-1].server, name)))
        assert end < 0.7 * start
        assert found.accounts[0]["notes"][f"distillation_divergence {name}"] == pytest.approx(end, rel=1e-4)


def test_the_loss_of_feddf_is_the_divergence_of_the_student_from_its_teacher():
    found = world(job("feddf"))
    model, (x, _) = built(found.problem, "cnn1", 0), images(found)
    teacher = softmax(np.random.default_rng(0).normal(size=(8, CLASSES)))
    value = feddf.distillation_loss(Modules({"model": model}), {"x": x, "teacher": torch.from_numpy(np.log(teacher))}, {})
    assert float(value) == pytest.approx(kl(teacher, softmax(model(x).numpy())), rel=1e-10)


def test_a_student_that_equals_its_teacher_learns_nothing():
    one = {"federation": {"clients": 1, "rounds": 2}, "models": {"names": ["cnn1"]}, "data": PUBLIC | {"partition": "iid"}}
    found, plain = went("feddf", **one), went("fedavg", **one)
    assert bits(found.states[-1].server) == bits(plain.states[-1].server)
    assert found.accounts[-1]["notes"]["distillation_divergence cnn1"] == pytest.approx(0, abs=1e-6)


def watched_stages(monkeypatch, distances: list[float]) -> tuple[FedDF, Run, list]:
    """FedDF with given divergences; and of each stage what it began with, the step, how many follow, and the result."""
    found = world(job("feddf", {"steps": 10, "stage": 2, "patience": 4}))
    stages, left, stage = [], iter(distances), FedDF.train_stage

    def watched(self, group, done, count, teacher, site):
        stages.append((group, done, count, stage(self, group, done, count, teacher, site)))
        return stages[-1][3]
    monkeypatch.setattr(FedDF, "train_stage", watched)
    monkeypatch.setattr(FedDF, "measure_divergence", lambda self, group, teacher, site: next(left))
    return step(found, FedDF), found, stages


def one_item(found, held_out: bool = True) -> Tree:
    parts = ("public", "held_out") if held_out else ("public",)
    teacher = {part: torch.randn(len(shard), CLASSES).log_softmax(1) for part, shard in zip(parts, found.public, strict=False)}
    return tree.join(model=built(found.problem, "cnn1", 0).float().state_dict(), teacher=teacher)


def test_training_ends_when_patience_is_over_and_the_best_stage_is_kept(monkeypatch):
    method, found, stages = watched_stages(monkeypatch, [1.0, 0.9, 0.5, 0.6, 0.5, 0.1])
    site = found.server_site(found.plan[0], 0, Ledger(found.problem.device))
    (kept,) = method.distil({0: one_item(found)}, site).values()
    assert [done for _, done, _, _ in stages] == [0, 2, 4, 6], "four steps after the second stage brought nothing, the fifth is never begun"
    assert bits(kept) == bits(tree.row(stages[1][3].part("model"), 0))


def test_an_average_that_no_stage_improves_stays_as_it_was(monkeypatch):
    method, found, _ = watched_stages(monkeypatch, [1.0, 1.5, 1.0, 2.0])
    item = one_item(found)
    (kept,) = method.distil({0: item}, found.server_site(found.plan[0], 0, Ledger(found.problem.device))).values()
    assert bits(kept) == bits(tree.part(item, "model"))


def test_without_held_out_images_all_steps_are_taken(monkeypatch):
    method, found, stages = watched_stages(monkeypatch, [1.0, 1.5, 1.6, 1.7, 1.8, 1.9])
    (kept,) = method.distil({0: one_item(found, held_out=False)}, found.server_site(found.plan[0], 0, Ledger(found.problem.device))).values()
    assert sum(count for _, _, count, _ in stages) == 10 and bits(kept) == bits(tree.row(stages[-1][3].part("model"), 0))


def test_feddf_needs_no_held_out_images():
    found = went("feddf", data={"public_fraction": 0.2, "validation_fraction": 0.0})
    notes = found.accounts[-1]["notes"]
    assert finite(found.states[-1].server) and all(notes[f"distillation_steps {name}"] == 3 for name in ("mlp2", "cnn1"))


def test_the_rate_of_distillation_falls_along_half_a_cosine_and_its_moments_go_on(monkeypatch):
    seen, turn = [], Turn

    def watched(trains, loss, optimizer):
        seen.append(optimizer)
        return turn(trains, loss, optimizer)
    monkeypatch.setattr(feddf, "Turn", watched)
    found = world(job("feddf", {"steps": 7, "stage": 2, "lr": 0.2}))
    group = Group("cnn1", (0,), tree.repeat(tree.join(model=built(found.problem, "cnn1", 0).float().state_dict()), 1))
    site, teacher = found.server_site(found.plan[0], 0, Ledger(found.problem.device)), torch.randn(len(found.public[0]), CLASSES).log_softmax(1)
    for done, count in ((0, 2), (2, 2), (4, 2), (6, 1)):
        group = step(found, FedDF).train_stage(group, done, count, teacher, site)
        assert group.state["optimizer/model/step/head.weight"].tolist() == [done + count]
    assert seen == [Optimizer("adam", pytest.approx(0.1 * (1 + math.cos(math.pi * done / 7)))) for done in (0, 2, 4, 6)]


def test_feddf_without_public_images_is_refused():
    with pytest.raises(JobError, match=r"data\.public_fraction = 0, wanted it above 0"):
        world(job("feddf", data={"public_fraction": 0.0}))
