"""Reference models: each has its own draw from the pool, is trained by the job's optimiser, and follows from its name and number alone."""
from dataclasses import fields

import pytest
import torch
from torch.nn import functional as F

from hpcfl.analysis.reference_models import train_references
from hpcfl.contract import Problem
from hpcfl.data.shards import Shard
from hpcfl.errors import JobError
from tests.support.in_memory import job, world
from tests.support.random_labels import ARCHITECTURE, marked, parts, problem


class Watched(Problem):
    """A Problem that trains nothing but gives away what it was to train on."""

    def fit(self, group, modules, turns, batches, **options):
        self.__dict__["seen"] = {model: list(batches(model)) for model in group.clients}
        return group, {}


def test_every_reference_model_has_its_own_draw_from_the_pool_each_image_once_an_epoch():
    given = problem()
    watched = Watched(**{field.name: getattr(given, field.name) for field in fields(given)})
    train_references(watched, ARCHITECTURE, marked(50), 33, 2, 3)
    drawn = []
    for batches in watched.seen.values():
        passes = [torch.cat([batch["x"][:, 0, 0, 0] for batch in half]) for half in (batches[:2], batches[2:])]
        assert [len(batch["y"]) for batch in batches] == [16, 17] * 2
        assert all(torch.equal(batch["x"][:, 0, 0, 0].long() % 10, batch["y"]) for batch in batches)
        first, second = (set(each.tolist()) for each in passes)
        assert first == second and len(first) == 33 and first <= set(range(50)) and not torch.equal(*passes)
        drawn.append(frozenset(first))
    orders = {tuple(batches[0]["index"].tolist()) for batches in watched.seen.values()}
    assert len(set(drawn)) == 3 and len(orders) == 3


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_reference_model_is_trained_from_its_beginning_by_the_jobs_optimiser(rule):
    described, pool = world(job("fedavg", training={"batch": 40, "lr": 0.01, "optimizer": rule})).problem, parts()[2]
    pool = Shard(pool.images[:40], pool.labels[:40], pool.scale)
    predict = train_references(described, ARCHITECTURE, pool, 40, 3, 2)[1]
    with described.stream(f"references/{ARCHITECTURE}/init", 1).seeding():
        model = described.model(ARCHITECTURE)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[rule](model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(pool.pixels()), pool.labels).backward()
        optimizer.step()
    torch.testing.assert_close(predict(pool.pixels()), model(pool.pixels()).detach(), rtol=1e-4, atol=1e-5)


def test_a_reference_model_follows_from_its_name_and_number_alone():
    x, pool = parts()[0].pixels(), parts()[2]

    def made(count: int, purpose: str = "references") -> list[torch.Tensor]:
        return [predict(x) for predict in train_references(problem(), ARCHITECTURE, pool, 32, 1, count, purpose)]
    torch.manual_seed(1)
    one = made(1)
    torch.manual_seed(2)
    three = made(3)
    assert torch.equal(one[0], three[0]) and not torch.equal(three[0], three[1])
    assert not torch.equal(made(1, "others")[0], one[0])


@pytest.mark.parametrize("size, epochs, count", [(51, 1, 1), (1, 1, 1), (0, 1, 1), (50, 0, 1), (50, 1, 0)])
def test_reference_models_that_cannot_be_are_refused(size, epochs, count):
    with pytest.raises(JobError, match="reference models: got"):
        train_references(problem(), ARCHITECTURE, marked(50), size, epochs, count)
