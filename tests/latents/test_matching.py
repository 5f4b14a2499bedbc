"""Distribution matching against plain loops in float64, and what each reading calls a match."""
import numpy as np
import pytest
import torch

from hpcfl.latents.matching import BANDWIDTHS, MATCHINGS, match_class_mean, match_cycle, match_mmd_rbf, match_per_sample, match_second_moment

CLASSES, SAMPLES, SIZE = 3, 6, 4


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def example() -> list[torch.Tensor]:
    """f, v, fresh (Y, M, p), mean, deviation, weight (Y, p)."""
    weight = normal(CLASSES, SIZE, seed=5).exp()
    return [*(normal(CLASSES, SAMPLES, SIZE, seed=seed) + seed for seed in (0, 1, 2)), normal(CLASSES, SIZE, seed=3), normal(CLASSES, SIZE, seed=4).exp(),
            weight / weight.mean()]


def naive_mmd(f: np.ndarray, fresh: np.ndarray) -> float:
    """The U-statistic of one class, pair by pair."""
    joint = [*f, *fresh]
    apart = sorted(float(((a - b) ** 2).sum()) for a in joint for b in joint)
    median = apart[(len(apart) - 1) // 2]

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return sum(np.exp(-((a - b) ** 2).sum() / (bandwidth * median)) for bandwidth in BANDWIDTHS)
    m = len(f)
    within = sum(kernel(own[i], own[j]) for own in (f, fresh) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(kernel(a, b) for a in f for b in fresh) / m ** 2


def test_mmd_is_the_mean_over_classes_of_the_pairwise_statistic():
    f, v, fresh, mean, deviation, weight = example()
    want = np.mean([naive_mmd(*(each[y].numpy() for each in (f, fresh))) for y in range(CLASSES)])
    assert float(match_mmd_rbf(f, v, fresh, mean, deviation, weight)) == pytest.approx(want, rel=1e-12)


def mmd(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    unused = torch.zeros(len(one), SIZE, dtype=one.dtype)
    return torch.stack([match_mmd_rbf(one[i:i + 1], one[i:i + 1], other[i:i + 1], unused[:1], unused[:1], unused[:1]) for i in range(len(one))])


def test_mmd_is_zero_on_average_for_equal_distributions_and_not_for_others():
    draws = 600
    f, fresh = normal(draws, 8, SIZE, seed=1), normal(draws, 8, SIZE, seed=2)
    same, shifted, wider = mmd(f, fresh), mmd(f + 1, fresh), mmd(2 * f, fresh)
    error = float(same.std()) / draws ** 0.5
    assert abs(float(same.mean())) < 4 * error and float(same.min()) < 0
    assert float(shifted.mean()) > 20 * error and float(wider.mean()) > 20 * error


def test_the_mean_reading_is_a_weighted_squared_distance_of_means():
    f, v, fresh, mean, deviation, weight = (leaf.numpy() for leaf in example())
    want = np.mean([(weight[y] * (f[y].mean(0) - mean[y]) ** 2).sum() for y in range(CLASSES)])
    assert float(match_class_mean(*example())) == pytest.approx(want, rel=1e-12)


def test_moment2_adds_the_squared_distance_of_standard_deviations():
    f, v, fresh, mean, deviation, weight = (leaf.numpy() for leaf in example())
    want = np.mean([((f[y].std(0, ddof=1) - deviation[y]) ** 2).sum() for y in range(CLASSES)])
    assert float(match_second_moment(*example()) - match_class_mean(*example())) == pytest.approx(want, rel=1e-9)


def test_moment2_has_a_finite_slope_where_all_features_are_equal():
    f = torch.ones(1, 5, SIZE, requires_grad=True)
    one = torch.ones(1, SIZE)
    (slope,) = torch.autograd.grad(match_second_moment(f, f, f, one, one, one), f)
    assert bool(torch.isfinite(slope).all())


def test_per_sample_and_cycle_are_means_over_samples():
    f, v, fresh, mean, deviation, weight = (leaf.numpy() for leaf in example())
    pairs = [(y, m) for y in range(CLASSES) for m in range(SAMPLES)]
    assert float(match_per_sample(*example())) == pytest.approx(np.mean([(weight[y] * (f[y, m] - mean[y]) ** 2).sum() for y, m in pairs]), rel=1e-12)
    assert float(match_cycle(*example())) == pytest.approx(np.mean([((f[y, m] - v[y, m]) ** 2).sum() for y, m in pairs]), rel=1e-12)


def test_each_reading_is_zero_where_it_sees_a_match():
    f, v, fresh, mean, deviation, weight = example()
    centred = f - f.mean(1, keepdim=True) + mean.unsqueeze(1)
    assert float(match_class_mean(centred, v, fresh, mean, deviation, weight)) < 1e-24
    scaled = (centred - mean.unsqueeze(1)) / centred.std(1, keepdim=True) * deviation.unsqueeze(1) + mean.unsqueeze(1)
    assert float(match_second_moment(scaled, v, fresh, mean, deviation, weight)) < 1e-20
    assert float(match_per_sample(mean.unsqueeze(1).expand_as(f), v, fresh, mean, deviation, weight)) == 0
    assert float(match_cycle(f, f, fresh, mean, deviation, weight)) == 0


@pytest.mark.parametrize("name", MATCHINGS)
def test_every_reading_gives_a_scalar_with_a_slope(name):
    f, *others = example()
    f.requires_grad_()
    loss = MATCHINGS[name](f, *others)
    (slope,) = torch.autograd.grad(loss, f)
    assert loss.shape == () and bool(torch.isfinite(slope).all()) and bool((slope != 0).any())
