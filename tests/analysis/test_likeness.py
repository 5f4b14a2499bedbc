"""Likeness: known answers of memorisation ratios and Frechet distances, and the closest pairs of two sets."""
import math

import pytest
import torch

from hpcfl.analysis.likeness import Mnd, fid, find_closest, mnd
from hpcfl.errors import DataError, NonFiniteError


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whitened(count, size, seed=0):
    """Points (count, size) float64 of mean 0 and covariance I, to rounding."""
    x = drawn(count, size, seed=seed).double()
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * math.sqrt(count - 1)


def test_samples_that_are_the_validation_images_give_a_ratio_of_exactly_one():
    train, validation = drawn(40, 1, 6, 6), drawn(30, 1, 6, 6, seed=1)
    assert mnd(train, validation, validation.clone()) == Mnd(1.0, 0.0, 1.0)
    assert mnd(train, torch.cat([validation, train[:5]]), torch.cat([validation, train[:5]])) == Mnd(1.0, 0.0, 1.0)


def test_copies_of_the_training_images_give_a_huge_ratio():
    train, validation = drawn(40, 1, 6, 6), drawn(30, 1, 6, 6, seed=1)
    assert mnd(train, validation, train.clone()).ratio_mean > 1e5


def test_the_ratio_of_one_training_image_is_that_of_its_nearest_distances():
    train, validation, samples = torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [30.0, 0.0]]), torch.tensor([[0.0, 2.0], [9.0, 9.0]])
    assert mnd(train, validation, samples) == Mnd(pytest.approx(2.5), 0.0, 1.0)
    assert mnd(train, samples, validation) == Mnd(pytest.approx(0.4), 0.0, 0.0)


def test_ratios_are_summarised_over_the_training_images():
    train = torch.tensor([[0.0], [100.0]])
    found = mnd(train, torch.tensor([[1.0], [103.0]]), torch.tensor([[2.0], [101.0]]))     # ratios 1/2 and 3
    assert found == Mnd(pytest.approx(1.75), pytest.approx(1.25), 0.5)


def test_a_shared_scale_of_the_space_changes_no_ratio():
    train, validation, samples = (drawn(20, 5, seed=seed).double() for seed in range(3))
    assert mnd(7 * train, 7 * validation, 7 * samples).ratio_mean == pytest.approx(mnd(train, validation, samples).ratio_mean, rel=1e-12)


@pytest.mark.parametrize("count", [5, 200])
def test_equal_sets_have_no_frechet_distance(count):
    x = 100 * drawn(count, 40)
    assert fid(x, x.flip(0)) < 1e-9 * float(x.double().square().sum())


@pytest.mark.parametrize("count", [6, 300])
def test_a_shift_is_its_squared_length(count):
    x, shift = drawn(count, 30).double(), drawn(30, seed=1).double()
    assert fid(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)


def test_diagonal_covariances_have_a_closed_form():
    x, one, other = whitened(100, 6), torch.arange(1.0, 7.0).double(), torch.tensor([2.0, 0, 1, 5, 5, 9]).double()
    assert fid(x * one, x.flip(0) * other + 1) == pytest.approx(float((one - other).square().sum()) + 6, rel=1e-9)


def test_covariances_that_do_not_commute_agree_with_the_root_of_their_product():
    linalg = pytest.importorskip("scipy.linalg")
    x, y = drawn(200, 8).double() @ drawn(8, 8, seed=1).double(), drawn(150, 8, seed=2).double() @ drawn(8, 8, seed=3).double() + 1
    s, t = x.T.cov(), y.T.cov()
    wanted = (x.mean(0) - y.mean(0)).square().sum() + (s + t).trace() - 2 * linalg.sqrtm((s @ t).numpy()).real.trace()
    assert fid(x, y) == pytest.approx(float(wanted), rel=1e-9) and float(wanted) > 10


def test_fewer_samples_than_features_agree_with_the_same_points_turned():
    x, y, turn = drawn(5, 3).double(), drawn(4, 3, seed=1).double(), torch.linalg.qr(drawn(50, 50, seed=2).double()).Q
    padded = [torch.cat([each, torch.zeros(len(each), 47)], 1).double() @ turn for each in (x, y)]
    assert fid(*padded) == pytest.approx(fid(x, y), rel=1e-9)


def test_the_frechet_distance_is_symmetric_and_as_good_from_half_precision_sets():
    x, y = drawn(60, 9), 2 * drawn(40, 9, seed=1)
    assert fid(x, y) == pytest.approx(fid(y, x), rel=1e-12) and fid(x.half(), y.half()) == pytest.approx(fid(x, y), rel=1e-2)


@pytest.mark.parametrize(("real", "generated"), [((1, 4), (9, 4)), ((9, 4), (1, 4)), ((9, 4), (9, 5)), ((9, 4, 1), (9, 4, 1))])
def test_sets_without_a_covariance_or_of_other_widths_are_refused(real, generated):
    with pytest.raises(DataError, match="wanted"):
        fid(torch.zeros(real), torch.zeros(generated))


def test_features_that_are_not_finite_are_refused():
    x = torch.zeros(5, 2)
    with pytest.raises(NonFiniteError, match="diverged"):
        fid(x, x.index_fill(0, torch.tensor([1]), math.nan))


def test_the_closest_pairs_come_nearest_first_and_use_nothing_twice():
    points, others = torch.tensor([[0.0], [10.0], [0.5], [20.0]]), torch.tensor([[25.0], [0.4], [10.3]])
    found = find_closest(points, others, 9)
    assert found.points.tolist() == [2, 1, 3] and found.others.tolist() == [1, 2, 0]
    assert found.distances.tolist() == pytest.approx([0.1, 0.3, 5.0], rel=1e-5)
    assert find_closest(points, others, 2).points.tolist() == [2, 1]


def test_pairs_of_images_of_whole_numbers_do_not_wrap_around():
    points, others = torch.full((1, 1, 2, 2), 10, dtype=torch.uint8), torch.tensor([11, 5, 250], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    found = find_closest(points, others, 1)
    assert found.others.tolist() == [0] and found.distances.tolist() == [2.0]
