"""Partitions: pure, disjoint, complete, with the floors and the refusals they promise."""
import numpy as np
import pytest

from hpcfl.data import partition
from hpcfl.data.partition import partition_samples
from hpcfl.errors import DataError
from hpcfl.settings.sections import Data

LABELS = np.random.default_rng(0).permutation(np.arange(2000) % 10)
SCHEMES = sorted(partition.SCHEMES)


def parts(found):
    """All index arrays of a split."""
    return [*found.train, *found.validation, *found.test, found.public, found.public_validation]


def shard_sizes(found):
    return [len(train) + len(validation) + len(test) for train, validation, test in zip(found.train, found.validation, found.test, strict=True)]


def shard_counts(found, labels=LABELS, classes=10):
    return sum(found.counts(labels, classes, part) for part in ("train", "validation", "test"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_partition_is_a_pure_function_of_labels_settings_and_seed(scheme):
    data = Data(partition=scheme, public_fraction=0.1, fraction=0.9, alpha=0.5)
    one, again, other = partition_samples(LABELS, 5, data, 3), partition_samples(LABELS.copy(), 5, data, 3), partition_samples(LABELS, 5, data, 4)
    assert all(np.array_equal(a, b) for a, b in zip(parts(one), parts(again), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))


def test_a_partition_leaves_the_global_generator_alone():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    partition_samples(LABELS, 5, Data(partition="dirichlet"), 0)
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("clients", [1, 3, 10])
@pytest.mark.parametrize("public", [0.0, 0.2])
def test_clients_and_server_share_no_image_and_leave_none_out(scheme, clients, public):
    found = partition_samples(LABELS, clients, Data(partition=scheme, public_fraction=public, alpha=0.5), 0)
    dealt = np.concatenate(parts(found))
    assert np.array_equal(np.sort(dealt), np.arange(len(LABELS)))
    assert len(found.train) == len(found.validation) == len(found.test) == clients
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts(found))


def test_fraction_bounds_what_the_federation_owns_and_keeps_the_classes_even():
    found = partition_samples(LABELS, 4, Data(fraction=0.25), 0)
    assert sum(shard_sizes(found)) == 500
    assert shard_counts(found).sum(axis=0).tolist() == [50] * 10


def test_the_public_set_has_every_class_and_gives_a_share_to_selection():
    found = partition_samples(LABELS, 4, Data(public_fraction=0.05, validation_fraction=0.2), 0)
    assert (len(found.public), len(found.public_validation)) == (80, 20)
    assert np.bincount(LABELS[np.concatenate([found.public, found.public_validation])], minlength=10).tolist() == [10] * 10


def test_without_a_public_fraction_the_server_has_nothing():
    found = partition_samples(LABELS, 4, Data(), 0)
    assert len(found.public) == len(found.public_validation) == 0


def test_iid_shards_differ_by_at_most_one_image():
    sizes = shard_sizes(partition_samples(LABELS, 7, Data(), 0))
    assert max(sizes) - min(sizes) <= 1


def test_validation_and_test_take_their_share_of_each_shard_from_each_class():
    found = partition_samples(LABELS, 4, Data(validation_fraction=0.1, test_fraction=0.3), 0)
    total, test, validation = shard_counts(found), found.counts(LABELS, 10, "test"), found.counts(LABELS, 10, "validation")
    assert [len(part) for part in found.test] == [150] * 4 and [len(part) for part in found.validation] == [50] * 4
    assert np.abs(test - 0.3 * total).max() <= 1 and np.abs(validation - 0.1 * total).max() <= 2


def test_counts_are_the_picture_of_the_partition():
    labels = np.array([0, 0, 1, 1, 2, 2])
    found = partition.Partition((np.array([0, 1, 2]), np.array([5])), (np.array([3]), np.array([], dtype=np.int64)),
                            (np.array([4]),) * 2, *[np.array([])] * 2)
    assert found.counts(labels, 4).tolist() == [[2, 1, 0, 0], [0, 0, 1, 0]]
    assert found.counts(labels, 4, "validation").tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


def test_dirichlet_is_skewed_for_small_alpha_and_even_for_large():
    def largest_share(alpha):
        counts = shard_counts(partition_samples(LABELS, 5, Data(partition="dirichlet", alpha=alpha, minimum=1), 0))
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()
    assert largest_share(0.1) > 0.35 and largest_share(10000.0) < 0.12


def test_dirichlet_divides_a_class_by_its_own_draw():
    counts = shard_counts(partition_samples(LABELS, 5, Data(partition="dirichlet", alpha=1.0), 0))
    assert counts.sum(axis=0).tolist() == [200] * 10
    assert len({tuple(np.argsort(column)) for column in counts.T}) > 1


@pytest.mark.parametrize(("scheme", "settings"), [("dirichlet", {"alpha": 0.3}), ("lognormal", {"spread": 1.0})])
def test_every_shard_reaches_the_floor(scheme, settings):
    smallest = [min(shard_sizes(partition_samples(LABELS, 10, Data(partition=scheme, minimum=60, **settings), seed))) for seed in range(5)]
    lower = [min(shard_sizes(partition_samples(LABELS, 10, Data(partition=scheme, minimum=1, **settings), seed))) for seed in range(5)]
    assert min(smallest) >= 60 and min(lower) < 60                 # without the floor some draws stay below it: the redraw did something


@pytest.mark.parametrize(("scheme", "settings"), [("dirichlet", {"alpha": 0.01}), ("lognormal", {"spread": 3.0})])
def test_a_floor_that_no_draw_reaches_ends_in_an_error(scheme, settings, monkeypatch):
    monkeypatch.setattr(partition, "TRIES", 20)
    with pytest.raises(DataError, match="in 20 draws.*data.minimum = 150.*client"):
        partition_samples(LABELS, 10, Data(partition=scheme, minimum=150, **settings), 0)


@pytest.mark.parametrize("scheme", ["dirichlet", "lognormal"])
def test_a_floor_beyond_the_data_is_refused_without_drawing(scheme, monkeypatch):
    monkeypatch.setattr(partition, "TRIES", 0)
    with pytest.raises(DataError, match="each need 2010, there are 2000"):
        partition_samples(LABELS, 10, Data(partition=scheme, minimum=201), 0)


def test_shards_give_every_client_few_classes():
    found = partition_samples(LABELS, 10, Data(partition="shards", classes_per_client=2), 0)
    classes = (shard_counts(found) > 0).sum(axis=1)
    assert shard_sizes(found) == [200] * 10 and classes.max() <= 2
    assert classes.max() == 2 and (np.diag(shard_counts(found)) == 0).any()        # pieces are dealt at random, not in order of class


def test_shards_that_would_be_empty_are_refused():
    with pytest.raises(DataError, match="classes_per_client"):
        partition_samples(LABELS[:30], 10, Data(partition="shards", classes_per_client=4), 0)


def test_disjoint_gives_no_class_to_two_clients():
    found = partition_samples(LABELS, 4, Data(partition="disjoint"), 0)
    owners = shard_counts(found) > 0
    assert owners.sum(axis=0).tolist() == [1] * 10
    assert sorted(owners.sum(axis=1)) == [2, 2, 3, 3]


def test_disjoint_with_more_clients_than_classes_names_the_client_without_any():
    with pytest.raises(DataError, match="client 10 has none"):
        partition_samples(LABELS, 11, Data(partition="disjoint"), 0)


def test_lognormal_sizes_spread_with_the_setting_while_classes_stay_mixed():
    equal = shard_sizes(partition_samples(LABELS, 8, Data(partition="lognormal", spread=0.0), 0))
    found = partition_samples(LABELS, 8, Data(partition="lognormal", spread=1.0), 0)
    assert max(equal) - min(equal) <= 1
    assert max(shard_sizes(found)) > 2 * min(shard_sizes(found))
    largest = shard_counts(found)[np.argmax(shard_sizes(found))]
    assert largest.min() > 0.5 * largest.mean()


def test_a_class_that_nobody_has_is_allowed():
    labels = LABELS[LABELS != 3]
    for scheme in SCHEMES:
        assert partition_samples(labels, 4, Data(partition=scheme, alpha=0.5), 0).counts(labels, 10)[:, 3].sum() == 0


def test_more_clients_than_images_are_refused():
    with pytest.raises(DataError, match="21 clients share 20 images"):
        partition_samples(LABELS[:20], 21, Data(), 0)
    with pytest.raises(DataError, match="11 clients share 10 images"):
        partition_samples(LABELS[:20], 11, Data(public_fraction=0.5), 0)


def test_a_client_without_training_images_is_named():
    with pytest.raises(DataError, match="client 0 has 2 images, 1 for test and 1 for validation"):
        partition_samples(LABELS[:20], 10, Data(test_fraction=0.5, validation_fraction=0.5), 0)


def test_a_public_set_that_rounds_to_nothing_is_refused():
    with pytest.raises(DataError, match="public_fraction"):
        partition_samples(LABELS[:40], 2, Data(public_fraction=0.01), 0)


def test_a_single_image_per_client_is_enough_to_train_on():
    found = partition_samples(LABELS[:10], 10, Data(), 0)
    assert [len(part) for part in found.train] == [1] * 10


def test_the_public_set_does_not_depend_on_how_the_rest_is_dealt():
    one, other = (partition_samples(LABELS, clients, Data(partition=scheme, public_fraction=0.1), 0) for clients, scheme in ((2, "iid"), (7, "lognormal")))
    assert np.array_equal(one.public, other.public)
