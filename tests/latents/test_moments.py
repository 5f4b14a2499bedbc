"""Moments of parts, put together in any of the offered ways, are the moments of the pooled samples."""
from functools import reduce

import numpy as np
import pytest
import torch

from hpcfl.errors import DataError, LayoutError, NonFiniteError
from hpcfl.latents.moments import (
    MODES,
    ClassGaussians,
    aggregate,
    find_covariances,
    from_message,
    from_sums,
    keep_previous,
    measure,
    measure_scatter,
    needs_full,
    pack_triangle,
    sum_features,
    to_message,
    unpack_triangle,
)
from hpcfl.wire.communicator import Communicator, connect
from hpcfl.wire.uplink import Sums, Uplink
from tests.support.verdict import mpi_assert

CLASSES, SIZE, OFFSET = 6, 5, 1e3
ALONE, NOBODY = 4, 5                                               # class 4 has one sample in all, class 5 none


def client(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, p) with offset 1e3 and a shift of each client's own, labels of classes 0..3 in unequal numbers; client 1 has the lone sample."""
    generator = torch.Generator().manual_seed(index)
    labels = torch.randint(0, 4 - index % 2, (20 + 7 * index,), generator=generator)
    labels = torch.cat([labels, torch.tensor([ALONE])]) if index == 1 else labels
    return torch.randn(len(labels), SIZE, generator=generator, dtype=torch.float64) + OFFSET + 2 * index + labels[:, None], labels


CLIENTS = [client(0), client(1), (torch.zeros(0, SIZE, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)), client(3)]
POOLED = torch.cat([z for z, _ in CLIENTS]), torch.cat([y for _, y in CLIENTS])


def reference(z: torch.Tensor, y: torch.Tensor, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Means (C, p) and spread of the pooled samples, class by class with NumPy."""
    features, labels, kind = z.numpy(), y.numpy(), MODES[mode]
    groups = [features[labels == label] for label in range(CLASSES)]
    means = np.stack([group.mean(0) if len(group) else np.zeros(SIZE) for group in groups])
    scatters = np.stack([(group - mean).T @ (group - mean) for group, mean in zip(groups, means, strict=True)])
    if kind.shared:
        covariance = scatters.sum(0) / (len(features) - sum(len(group) > 0 for group in groups))
        return means, covariance if kind.full else np.diag(covariance)
    covariances = scatters / np.array([max(len(group), 1) for group in groups])[:, None, None]
    variances = np.stack([np.diag(covariance) for covariance in covariances])
    return means, covariances if kind.full else variances.mean(1) if kind.isotropic else variances


def assert_close(got: torch.Tensor, want, tolerance: float = 1e-10) -> None:
    want = want if isinstance(want, torch.Tensor) else torch.tensor(want)
    assert got.shape == want.shape
    assert float((got - want).norm()) <= tolerance * float(want.norm()), f"relative error {float((got - want).norm() / want.norm()):.1e}"


def exact(z: torch.Tensor, y: torch.Tensor, mode: str, **options) -> dict[str, torch.Tensor]:
    return to_message(measure(z, y, CLASSES, needs_full(mode)), mode, dtype=torch.float64, **options)


@pytest.mark.parametrize("mode", MODES)
def test_aggregated_messages_are_the_moments_of_the_pooled_samples(mode):
    together = aggregate([exact(*samples, mode) for samples in CLIENTS], mode)
    means, spread = reference(*POOLED, mode)
    assert_close(together.mean, means)
    assert_close(together.spread, spread)
    assert together.has.tolist() == [True] * 5 + [False]
    assert together.count.tolist() == torch.bincount(POOLED[1], minlength=CLASSES).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_the_two_phase_form_gives_the_same(mode):
    first = [sum_features(*samples, CLASSES) for samples in CLIENTS]
    counts, sums = (reduce(torch.add, [each[name] for each in first]) for name in ("counts", "sums"))
    centre = sums / counts.clamp(min=1)[:, None]
    scatter = reduce(torch.add, [measure_scatter(*samples, centre, mode) for samples in CLIENTS])
    two_phase = from_sums(counts, sums, scatter, mode)
    one_phase = aggregate([exact(*samples, mode) for samples in CLIENTS], mode)
    assert_close(two_phase.mean, one_phase.mean)
    assert_close(two_phase.spread, one_phase.spread)
    assert_close(two_phase.within, one_phase.within + one_phase.between)
    assert torch.equal(two_phase.has, one_phase.has) and torch.equal(two_phase.count, one_phase.count)


def combined(comm: Communicator, trees: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
    """The plain sums of the Trees of all clients of all ranks, at rank 0; the server learns nothing else."""
    sums = [Sums.weighted([index], {path: leaf[None] for path, leaf in tree.items()}, torch.ones(1)) for index, tree in trees.items()]
    totals = comm.combine(sum((Uplink({"phase": each}) for each in sums), Uplink()))
    return totals["phase"].values if comm.is_server else None


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("mode", MODES)
def test_the_two_phases_work_across_ranks_and_with_a_rank_without_data(mode):
    comm = connect()
    mine = {index: samples for index, samples in enumerate(CLIENTS) if index % comm.size == comm.rank}   # on 3 or 4 ranks the third has no sample
    first = combined(comm, {index: sum_features(*samples, CLASSES) for index, samples in mine.items()})
    centre = comm.distribute({tuple(range(comm.size)): {"means": first["sums"] / first["counts"].clamp(min=1)[:, None]}} if comm.is_server else {})["means"]
    second = combined(comm, {index: {"scatter": measure_scatter(*samples, centre, mode)} for index, samples in mine.items()})
    if not comm.is_server:
        return mpi_assert(comm, first is second is None)
    got, want = from_sums(first["counts"], first["sums"], second["scatter"], mode), reference(*POOLED, mode)
    errors = [float((one - torch.tensor(other)).norm() / torch.tensor(other).norm()) for one, other in zip((got.mean, got.spread), want, strict=True)]
    mpi_assert(comm, max(errors) < 1e-10, f"relative errors {errors}")


@pytest.mark.parametrize("mode", MODES)
def test_moments_of_clients_in_any_order_are_those_of_one_client_with_all_samples(mode):
    pooled = aggregate([exact(*POOLED, mode)], mode)
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        merged = aggregate([exact(*CLIENTS[index], mode) for index in order], mode)
        assert torch.equal(merged.count, pooled.count)
        assert_close(merged.mean, pooled.mean)
        assert_close(merged.spread, pooled.spread)


def test_clients_of_one_sample_each_have_the_moments_of_all_samples():
    z, y = CLIENTS[0]
    merged = aggregate([exact(z[i:i + 1], y[i:i + 1], "class_full") for i in range(len(z))], "class_full")
    assert_close(merged.spread, aggregate([exact(z, y, "class_full")], "class_full").spread)


@pytest.mark.parametrize("mode", MODES)
def test_a_client_without_samples_changes_no_bit(mode):
    some, none = exact(*CLIENTS[1], mode), exact(*CLIENTS[2], mode)
    alone = aggregate([some], mode)
    for merged in (aggregate([some, none], mode), aggregate([none, some], mode)):
        assert all(torch.equal(leaf, getattr(alone, name)) for name, leaf in vars(merged).items())


def test_offset_does_not_spoil_float32_features():
    z = (torch.randn(500, SIZE, generator=torch.Generator().manual_seed(0)) + 1e3).float()
    variance = measure(z, torch.zeros(500, dtype=torch.int64), 1, False).scatter[0] / 500
    assert_close(variance, z.double().numpy().var(0), 1e-10)
    one_pass = z.square().mean(0) - z.mean(0).square()
    assert float((one_pass - variance).abs().max()) > 0.05, "the offset is too small to tell the two apart"


@pytest.mark.parametrize("mode", MODES)
def test_a_message_of_samples_that_nobody_has_is_zero_and_finite(mode):
    together = aggregate([exact(*CLIENTS[2], mode)], mode)
    assert not together.has.any() and not together.mean.any() and not together.spread.any()


@pytest.mark.parametrize("mode", MODES)
def test_single_samples_have_zero_spread_and_no_nan(mode):
    z, y = torch.randn(2, SIZE, dtype=torch.float64), torch.tensor([0, 3])
    together = aggregate([exact(z[:1], y[:1], mode), exact(z[1:], y[1:], mode)], mode)
    assert torch.equal(together.mean[[0, 3]], z) and not together.spread.any()


@pytest.mark.parametrize("mode", MODES)
def test_messages_have_the_shapes_and_bytes_of_the_mode(mode):
    message = to_message(measure(*CLIENTS[0], CLASSES, needs_full(mode)), mode)
    triangle = SIZE * (SIZE + 1) // 2
    floats = {"shared_diag": SIZE, "class_diag": CLASSES * SIZE, "class_iso": CLASSES,
              "shared_full": triangle, "class_full": CLASSES * triangle}[mode]
    assert message["counts"].dtype == torch.int64 and message["means"].dtype == message["spread"].dtype == torch.float32
    assert sum(leaf.nbytes for leaf in message.values()) == 8 * CLASSES + 4 * (CLASSES * SIZE + floats)


@pytest.mark.parametrize("mode", MODES)
def test_full_scatter_serves_diagonal_modes_as_well(mode):
    assert_close(find_covariances(measure(*CLIENTS[0], CLASSES, True), mode), exact(*CLIENTS[0], mode)["spread"], 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_message_tells_what_was_measured(mode):
    measured, told = measure(*CLIENTS[1], CLASSES, True), from_message(exact(*CLIENTS[1], mode), mode)
    assert torch.equal(told.count, measured.count) and torch.equal(told.mean, measured.mean)
    kind = MODES[mode]
    scatter = measured.scatter.sum(0) if kind.shared else measured.scatter
    diagonal = scatter.diagonal(dim1=-2, dim2=-1)
    assert_close(told.scatter, scatter if kind.full else diagonal.mean(-1) if kind.isotropic else diagonal, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_classes_below_the_minimum_count_leave_no_trace(mode):
    z, y = CLIENTS[1]
    rare = torch.bincount(y, minlength=CLASSES) < 9
    assert rare[:4].any() and not rare[:4].all(), "the example has no class on either side"
    common = ~rare[y]
    guarded, without = exact(z, y, mode, min_count=9), exact(z[common], y[common], mode)
    assert all(torch.equal(guarded[name], without[name]) for name in guarded)


def test_traces_tell_the_spread_inside_clients_from_that_between_them():
    for mode in MODES:
        together = aggregate([exact(*samples, mode) for samples in CLIENTS], mode)
        inside = aggregate([exact(*samples, mode) for samples in CLIENTS], mode, between_client=False)
        variances = reference(*POOLED, "shared_diag")[1]
        assert_close(together.within + together.between, variances.sum())
        assert float(together.between) > 1 and float(inside.between) == 0
        assert_close(inside.within, together.within)
        assert float(inside.spread.sum()) < float(together.spread.sum())


@pytest.mark.parametrize("mode", MODES)
def test_classes_without_samples_keep_what_was_known(mode):
    z, y = CLIENTS[0]
    shifted = z + 1
    before = aggregate([exact(z, y, mode)], mode)
    now = aggregate([exact(shifted[y != 2], y[y != 2], mode)], mode)
    kept = keep_previous(now, before, mode)
    assert now.has.tolist()[2] is False and kept.has.tolist()[2] is True
    assert torch.equal(kept.mean[2], before.mean[2]) and torch.equal(kept.mean[[0, 1, 3]], now.mean[[0, 1, 3]])
    assert kept.count[2] == before.count[2] > 0
    if MODES[mode].shared:
        assert torch.equal(kept.spread, now.spread)
    else:
        assert torch.equal(kept.spread[2], before.spread[2]) and torch.equal(kept.spread[0], now.spread[0])
    nothing = aggregate([exact(*CLIENTS[2], mode)], mode)
    assert all(torch.equal(leaf, getattr(before, name)) for name, leaf in vars(keep_previous(nothing, before, mode)).items())


def test_global_moments_are_a_tree_and_back():
    moments = aggregate([exact(*CLIENTS[0], "shared_diag")], "shared_diag")
    assert all(isinstance(leaf, torch.Tensor) for leaf in vars(moments).values())
    assert vars(ClassGaussians(**dict(vars(moments)))) == vars(moments)


def test_triangles_are_packed_without_loss():
    matrix = torch.randn(3, 7, 7)
    matrix = matrix + matrix.mT
    assert pack_triangle(matrix).shape == (3, 28)
    assert torch.equal(unpack_triangle(pack_triangle(matrix)), matrix)
    assert pack_triangle(torch.tensor([[1, 2], [2, 3]])).tolist() == [1, 2, 3]


def test_what_cannot_be_measured_or_aggregated_is_refused():
    z, y = CLIENTS[0]
    for poison in (float("nan"), float("inf")):
        spoiled = z.clone()
        spoiled[3, 1] = poison
        with pytest.raises(NonFiniteError, match="client 4, round 2: NaN or infinity in 1 of"):
            measure(spoiled, y, CLASSES, False, where="client 4, round 2")
    with pytest.raises(DataError, match="wanted 0 to 1"):
        measure(z, y, 2, False)
    with pytest.raises(LayoutError, match="needs scatter matrices"):
        find_covariances(measure(z, y, CLASSES, False), "shared_full")
    with pytest.raises(LayoutError, match=r"message 1: 'means' is \(6, 4\), message 0 has \(6, 5\)"):
        aggregate([exact(z, y, "class_iso"), exact(z[:, :4], y, "class_iso")], "class_iso")
    with pytest.raises(DataError, match="no client"):
        aggregate([], "class_iso")


def test_the_same_samples_give_the_same_bits():
    one, other = (aggregate([to_message(measure(*samples, CLASSES, True), "class_full") for samples in CLIENTS], "class_full") for _ in range(2))
    assert all(torch.equal(leaf, getattr(other, name)) for name, leaf in vars(one).items())
