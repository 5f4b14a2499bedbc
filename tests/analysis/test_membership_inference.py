"""Membership attacks: known answers of their scores, of AUC, interval and rate at few false alarms, and small networks with and without something to hide."""
import math
from dataclasses import fields
from functools import cache
from statistics import NormalDist

import pytest
import torch
from torch.nn import functional as F

from hpcfl.analysis import membership_inference
from hpcfl.analysis.membership_inference import Attack, calibrate, compute_losses, measure_nearest, threshold_attack
from hpcfl.analysis.reference_models import train_references
from hpcfl.contract import Problem
from hpcfl.data.shards import Scale, Shard
from hpcfl.errors import DataError, JobError, NonFiniteError
from hpcfl.training.evaluate import bind
from tests.support.in_memory import job, world

NORMAL = NormalDist()
MEMBERS, ARCHITECTURE, EPOCHS = 100, "mlp2", 150


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quantiles(count: int) -> torch.Tensor:
    """The standard normal distribution as evenly as so many numbers can show it."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def shifted(distance: float, members: int, others: int, seed: int = 0) -> Attack:
    return threshold_attack(normal(members, seed=2 * seed) + distance, normal(others, seed=2 * seed + 1))


def area(distance: float) -> float:
    """The AUC of two normal distributions of variance 1 that far apart."""
    return NORMAL.cdf(distance / math.sqrt(2))


def marked(count: int) -> Shard:
    """Images that carry their index in every pixel."""
    return Shard(torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(count) % 10, Scale())


@cache
def problem() -> Problem:
    return world(job("fedavg", training={"batch": 16, "lr": 0.2})).problem


@cache
def parts() -> tuple[Shard, Shard, Shard]:
    """Members, others and a pool, of digits with labels drawn at random: to know such a label is to have seen it."""
    digits = world(job("fedavg")).corpus
    images = torch.from_numpy(digits.train_images())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (len(images),), generator=torch.Generator().manual_seed(1))
    return tuple(Shard(images[part], labels[part], problem().scale) for part in order[:1000].split([MEMBERS, 300, 600]))


@cache
def target():
    """A model that had every chance to learn its members by heart."""
    return train_references(problem(), ARCHITECTURE, parts()[0], MEMBERS, EPOCHS, 1, "target")[0]


@cache
def references(count: int = 3):
    return train_references(problem(), ARCHITECTURE, parts()[2], MEMBERS, EPOCHS, count)


def attacked(predict) -> Attack:
    members, others, _ = parts()
    return threshold_attack(-compute_losses(predict, members), -compute_losses(predict, others))


# Scores

def test_losses_are_cross_entropies_in_the_shards_order_whatever_the_batch():
    weights, shard = normal(64, 10, seed=3, dtype=torch.float32), Shard(normal(30, 1, 8, 8, dtype=torch.float32), torch.arange(30) % 10, Scale())
    found = compute_losses(lambda x: x.flatten(1) @ weights, shard, 7)
    assert found.shape == (30,) and found.dtype == torch.float64
    logits = shard.images.flatten(1) @ weights
    torch.testing.assert_close(found, F.cross_entropy(logits.double(), shard.labels, reduction="none"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compute_losses(lambda x: x.flatten(1) @ weights, shard), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [30.0, 50.0, 300.0])
def test_losses_of_a_model_that_is_all_but_certain_keep_their_order(gap):
    def predict(x: torch.Tensor) -> torch.Tensor:
        return F.one_hot(torch.tensor([0, 1]), 3) * torch.tensor([[gap], [gap + 1]])
    found = compute_losses(predict, Shard(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]), Scale()))
    assert found.tolist() == pytest.approx([2 * math.exp(-gap), 2 * math.exp(-gap - 1)], rel=1e-9, abs=0)


def test_losses_of_no_image_and_of_a_diverged_model_are_refused():
    with pytest.raises(DataError, match="no image"):
        compute_losses(lambda x: x, marked(0))
    with pytest.raises(NonFiniteError, match="logits that are not finite"):
        compute_losses(lambda x: torch.full((len(x), 10), math.nan), marked(3))


def test_calibration_takes_the_mean_of_the_references_and_the_target_away():
    found = calibrate(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 2.0], [5.0, 0.0]]))
    assert found.tolist() == [3.0, -1.0]


def test_calibration_brings_out_members_that_difficulty_hides():
    count, hard, noise, four = 20_000, 5.0, 0.5, 4
    difficulty, seen = hard * normal(2 * count), torch.arange(2 * count) < count
    own = difficulty + noise * normal(2 * count, seed=1) - seen.double()
    scores = calibrate(own, difficulty + noise * normal(four, 2 * count, seed=2))
    plain, better = (threshold_attack(each[seen], each[~seen]) for each in (-own, scores))
    assert plain.auc == pytest.approx(area(1 / math.hypot(hard, noise)), abs=0.01)
    assert better.auc == pytest.approx(area(1 / (noise * math.sqrt(1 + 1 / four))), abs=0.01)


@pytest.mark.parametrize("references", [torch.zeros(0, 3), torch.zeros(2, 4), torch.zeros(3)])
def test_references_of_other_images_or_none_are_refused(references):
    with pytest.raises(DataError, match=r"\(3,\) of the target.*wanted \(n,\) and \(R, n\)"):
        calibrate(torch.zeros(3), references)


# Nearest samples

def naive(points: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    return (points.double()[:, None] - samples.double()).square().sum(-1).min(1).values


@pytest.mark.parametrize("block", [1, 7, 1024])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_nearest_sample_is_that_of_the_naive_search(block, offset, monkeypatch):
    monkeypatch.setattr(membership_inference, "BLOCK", block)
    points, samples = normal(23, 5) + offset, normal(40, 5, seed=1) + offset
    torch.testing.assert_close(measure_nearest(points, samples), naive(points, samples), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_a_copy_is_at_distance_zero_exactly_and_a_near_copy_is_not(dtype):
    samples = (50 * normal(300, 1, 8, 8) + 128).clamp(0, 255).to(dtype)
    points = samples[[200, 7]].clone()
    points[1, 0, 3, 3] += 1
    found = measure_nearest(points, samples)
    assert found.dtype == torch.float64 and float(found[0]) == 0
    assert float(found[1]) == pytest.approx(1, rel=1e-4)


def test_samples_that_copy_members_give_them_away():
    members, others = normal(200, 64), normal(200, 64, seed=1)
    samples = torch.cat([members[:100] + 1e-3 * normal(100, 64, seed=2), normal(500, 64, seed=3)])
    attack = threshold_attack(-measure_nearest(members, samples), -measure_nearest(others, samples))
    assert attack.tpr_at_1_percent_fpr >= 0.5 and attack.auc == pytest.approx(0.75, abs=0.04)
    apart = normal(500, 64, seed=4)
    scores = [calibrate(measure_nearest(each, samples), measure_nearest(each, apart).unsqueeze(0)) for each in (members, others)]
    assert threshold_attack(*scores).tpr_at_1_percent_fpr >= 0.5


@pytest.mark.parametrize("points, samples", [((0, 4), (3, 4)), ((3, 4), (0, 4)), ((3, 4), (3, 5)), ((3, 1, 2, 2), (3, 4))])
def test_nothing_to_compare_is_refused(points, samples):
    with pytest.raises(DataError, match="nearest: got points"):
        measure_nearest(torch.zeros(points), torch.zeros(samples))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("spoiled", [0, 1])
def test_samples_of_a_diverged_generator_are_refused(value, spoiled):
    sides = [normal(5, 3), normal(6, 3)]
    sides[spoiled][2, 1] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        measure_nearest(*sides)


# Attacks

def test_separated_scores_are_told_apart_without_error():
    low, high = torch.linspace(0, 1, 100), torch.linspace(2, 3, 150)
    attack = threshold_attack(high, low)
    assert (attack.auc, attack.tpr_at_1_percent_fpr, attack.members, attack.others, attack.resolution) == (1, 1, 150, 100, 0.01)
    assert 0.9 < attack.auc_interval[0] < 0.99 and attack.auc_interval[1] == 1
    back = threshold_attack(low, high)
    assert (back.auc, back.tpr_at_1_percent_fpr) == (0, 0)
    assert back.auc_interval == pytest.approx((0, 1 - attack.auc_interval[0]))


def test_equal_scores_tell_nothing():
    attack = threshold_attack(torch.zeros(50), torch.zeros(200))
    assert (attack.auc, attack.tpr_at_1_percent_fpr) == (0.5, 0)
    assert attack.auc_interval[0] < 0.5 < attack.auc_interval[1]


def test_ties_count_half():
    assert threshold_attack(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])).auc == 3.5 / 4
    members, others = (torch.randint(0, 6, (count,), generator=torch.Generator().manual_seed(count)) for count in (70, 90))
    apart = members[:, None] - others
    assert threshold_attack(members, others).auc == pytest.approx(float(((apart > 0) + 0.5 * (apart == 0)).double().mean()), rel=1e-12)


@pytest.mark.parametrize("distance", [0.0, 0.5, 1.0, 2.0])
def test_shifted_normal_scores_have_the_area_and_the_rate_of_the_closed_form(distance):
    attack = threshold_attack(quantiles(5_000) + distance, quantiles(8_000))
    assert attack.auc == pytest.approx(area(distance), abs=1e-4)
    assert attack.tpr_at_1_percent_fpr == pytest.approx(NORMAL.cdf(distance - NORMAL.inv_cdf(0.99)), abs=1e-3)


def test_the_interval_of_scores_that_tell_nothing_is_that_of_the_rank_test():
    members, others = 5_000, 8_000
    low, high = threshold_attack(quantiles(members), quantiles(others)).auc_interval
    deviation = math.sqrt((members + others + 1) / (12 * members * others))
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(2 * 1.96 * deviation, rel=1e-3)


@pytest.mark.parametrize("members, others", [(40, 40), (30, 200)])
@pytest.mark.parametrize("distance", [0.0, 1.0, 3.0])
def test_the_interval_holds_the_true_area_in_at_least_95_of_100_draws(distance, members, others):
    intervals = [shifted(distance, members, others, seed).auc_interval for seed in range(300)]
    share = sum(low <= area(distance) <= high for low, high in intervals) / 300
    assert share >= 0.93                                           # 0.95 less what 300 draws may be off by
    assert share < 1 or distance == 3.0, "an interval that never misses is too wide"


def test_at_most_one_other_in_a_hundred_may_pass():
    others = torch.arange(200.0)
    assert threshold_attack(torch.tensor([198.5, 197.5, 196.5, 0.0]), others).tpr_at_1_percent_fpr == 2 / 4     # 1, 2 and 3 false alarms
    assert threshold_attack(others, others).tpr_at_1_percent_fpr == 2 / 200                                     # thresholds on one straight line


def test_with_few_others_the_resolution_says_what_one_percent_means():
    attack = threshold_attack(torch.tensor([9.5, 8.5, 0.0]), torch.arange(10.0))
    assert attack.resolution == 0.1 and attack.tpr_at_1_percent_fpr == 1 / 3                                   # without any false alarm


@pytest.mark.parametrize("scores", [torch.zeros(0), torch.zeros(3, 2), torch.tensor(1.0)])
@pytest.mark.parametrize("name", ["members", "others"])
def test_scores_that_are_none_or_not_one_per_image_are_refused(scores, name):
    with pytest.raises(DataError, match=f"scores of {name}"):
        threshold_attack(**({"members": torch.ones(3), "others": torch.ones(3)} | {name: scores}))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="scores of others"):
        threshold_attack(torch.zeros(2), torch.tensor([0.0, math.nan]))


# Networks

def test_a_network_that_learned_its_members_by_heart_is_found_out():
    attack = attacked(target())
    assert attack.auc > 0.85 and attack.auc_interval[0] > 0.8 and attack.tpr_at_1_percent_fpr > 0.05


def test_an_untrained_network_and_those_trained_on_other_images_know_no_members():
    module = problem().structure(ARCHITECTURE)
    for predict in (bind(module, module.state_dict()), *references()):
        low, high = attacked(predict).auc_interval
        assert low < 0.5 < high


def test_the_calibrated_attack_finds_it_too_and_leaves_the_others_alone():
    members, others, _ = parts()
    spared, *judges = references()

    def attack(predict) -> Attack:
        return threshold_attack(*(calibrate(compute_losses(predict, part), torch.stack([compute_losses(judge, part) for judge in judges]))
                                 for part in (members, others)))
    assert attack(target()).auc_interval[0] > 0.65
    low, high = attack(spared).auc_interval
    assert low < 0.5 < high


# Reference models

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
