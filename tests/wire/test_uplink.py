"""Sums add up like NumPy sums whatever the order, Uploads stay apart, and what cannot be added says so."""
import numpy as np
import pytest
import torch

from hpcfl.errors import LayoutError
from hpcfl.wire.combining import make_header
from hpcfl.wire.uplink import SUM_BLOCK, Sums, Uplink, Uploads, find_difference

SHAPES = {"weight": (3, 4), "bias": (4,), "scale": (), "none": (0, 2), "long": (SUM_BLOCK["cpu"] + 7,)}


def values(clients: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.randn(clients, *shape, generator=generator).to(dtype) for path, shape in SHAPES.items()}


def numpy_sum(value: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    aligned = weight.double().numpy().reshape(*weight.shape, *[1] * (value.dim() - weight.dim()))
    return (value.double().numpy() * aligned).sum(0)


def same_bits(one, other) -> bool:
    return all(torch.equal(one.values[path], other.values[path]) and torch.equal(one.counts[path], other.counts[path]) for path in one.values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_total_is_the_weighted_numpy_sum_in_float64(dtype):
    stacked, weights = values(5, dtype=dtype), torch.tensor([3.0, 0.0, 1.5, 2.0, 10.0])
    kept = {path: value.clone() for path, value in stacked.items()}
    total = Sums.weighted(range(5), stacked, weights).total()
    for path, value in stacked.items():
        assert total.values[path].dtype == torch.float64 and total.values[path].shape == value.shape[1:]
        np.testing.assert_allclose(total.values[path].numpy(), numpy_sum(value, weights), rtol=1e-12, atol=1e-12)
        assert total.counts[path].shape == () and float(total.counts[path]) == 16.5
        assert torch.equal(value, kept[path]), "the clients' own values were changed"


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 1), (4, 1, 5), (4, 3, 5)])
def test_weights_may_be_per_client_per_class_or_per_element(shape):
    value, weight = torch.randn(4, 3, 5), torch.rand(shape)
    total = Sums.weighted(range(4), {"x": value}, {"x": weight}).total()
    np.testing.assert_allclose(total.values["x"].numpy(), numpy_sum(value, weight), rtol=1e-12)
    np.testing.assert_allclose(torch.broadcast_to(total.counts["x"], (3, 5)).numpy(), numpy_sum(torch.ones(4, 3, 5), weight), rtol=1e-12)


def test_mean_is_zero_where_nobody_contributed_and_has_says_so():
    weight = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    total = Sums.weighted([0, 1], {"mean": torch.tensor([[[2.0], [9.0]], [[6.0], [9.0]]])}, {"mean": weight}).total()
    assert total.mean()["mean"].tolist() == [[5.0], [0.0]]
    assert total.has()["mean"].tolist() == [[True], [False]]


def test_sums_do_not_depend_on_how_clients_were_grouped_or_ordered():
    stacked, weights = values(6), torch.rand(6)

    def of(*clients: int) -> Sums:
        return Sums.weighted(clients, {path: value[list(clients)] for path, value in stacked.items()}, weights[list(clients)])
    whole = of(0, 1, 2, 3, 4, 5).total()
    assert same_bits(whole, (of(5, 3) + of(0, 4) + of(2, 1)).total())
    assert same_bits(whole, (of(1) + (of(4) + of(0)) + of(5) + of(2, 3)).total())
    assert not same_bits(whole, of(0, 1, 2, 3, 4).total()), "the comparison cannot fail"


def test_adding_never_cancels_large_offsets():
    stacked = {"x": torch.tensor([[1e8], [1.0], [-1e8]], dtype=torch.float32)}
    assert float(Sums.weighted(range(3), stacked, torch.ones(3)).total().values["x"]) == 1.0


def test_strided_leaves_and_leaves_with_gradients_are_taken_as_they_are():
    value = torch.randn(3, 5, 4, requires_grad=True)
    total = Sums.weighted(range(3), {"x": value.transpose(1, 2)}, torch.ones(3)).total()
    np.testing.assert_allclose(total.values["x"].numpy(), value.detach().double().numpy().sum(0).T, rtol=1e-12)
    assert not total.values["x"].requires_grad


def test_a_client_may_contribute_twice_and_a_group_may_be_empty():
    once = Sums.weighted([7], {"x": torch.ones(1, 2)}, torch.ones(1))
    empty = Sums.weighted([], {"x": torch.ones(0, 2)}, torch.ones(0))
    assert (once + empty + once).total().values["x"].tolist() == [2.0, 2.0]
    assert empty.total().mean()["x"].tolist() == [0.0, 0.0]


def test_simulated_bytes_count_values_in_their_own_type_and_weights_only_if_sent():
    stacked = {"x": torch.zeros(2, 3), "y": torch.zeros(2, 5, dtype=torch.float64)}
    shared = Sums.weighted([4, 9], stacked, torch.ones(2))
    assert shared.simulated_bytes() == {4: 3 * 4 + 5 * 8 + 8, 9: 3 * 4 + 5 * 8 + 8}
    assert Sums.weighted([4, 9], stacked, torch.ones(2), weights_sent=False).simulated_bytes() == {4: 52, 9: 52}
    assert Sums.weighted([4, 9], stacked, {"x": torch.ones(2, 3), "y": torch.ones(2)}).simulated_bytes() == {4: 52 + 32, 9: 52 + 32}
    assert Sums.weighted([4, 9], stacked, {"x": torch.ones(2, 3), "y": torch.ones(2)}, sent_bytes=11).simulated_bytes() == {4: 11, 9: 11}
    whole = Uplink({"a": shared, "b": Uploads({4: {"z": torch.zeros(7, dtype=torch.int64)}})})
    assert whole.simulated_bytes() == {4: 60 + 56, 9: 60}


def test_uplinks_add_by_name_and_the_empty_one_is_zero():
    one = Uplink({"a": Sums.weighted([0], {"x": torch.ones(1)}, torch.ones(1)), "u": Uploads({0: {}})})
    other = Uplink({"a": Sums.weighted([1], {"x": torch.full((1,), 4.0)}, torch.ones(1)), "u": Uploads({1: {}}),
                        "b": Sums.weighted([1], {"x": torch.ones(1)}, torch.ones(1))})
    both = sum([one, other], Uplink())
    assert float(both.pieces["a"].total().values["x"]) == 5.0 and float(both.pieces["b"].total().values["x"]) == 1.0
    assert set(both.pieces["u"].trees) == {0, 1}
    assert set(one.pieces["u"].trees) == {0}, "+ changed its left side"


def test_what_does_not_belong_together_cannot_be_added():
    def sums(**shapes):
        return Sums.weighted([0], {path: torch.ones(1, *shape) for path, shape in shapes.items()}, torch.ones(1))
    with pytest.raises(LayoutError, match=r"'b' is \(3,\) on one side, \(4,\) on the other"):
        sums(a=(2,), b=(3,)) + sums(a=(2,), b=(4,))
    with pytest.raises(LayoutError, match="'b' is absent"):
        sums(a=(2,)) + sums(a=(2,), b=(4,))
    with pytest.raises(LayoutError, match=r"'a' is \(2,\) with counts \(\) on one side, \(2,\) with counts \(2,\)"):
        sums(a=(2,)) + Sums.weighted([0], {"a": torch.ones(1, 2)}, {"a": torch.ones(1, 2)})
    with pytest.raises(LayoutError, match="client 3 uploads twice"):
        Uploads({3: {}}) + Uploads({3: {}, 4: {}})
    with pytest.raises(LayoutError, match="'n' is Sums on one side, Uploads"):
        Uplink({"n": sums(a=(2,))}) + Uplink({"n": Uploads({0: {}})})


@pytest.mark.parametrize(("clients", "tree", "weights", "said"), [
    ([0, 1], {"x": torch.ones(3, 2)}, torch.ones(2), "client axis of length 2"),
    ([0, 1], {"x": torch.ones(2, 2)}, torch.ones(3), "client axis of length 2"),
    ([0, 1], {"x": torch.ones(())}, torch.ones(2), "client axis of length 2"),
    ([0, 1], {"steps": torch.ones(2, dtype=torch.int64)}, torch.ones(2), "never averaged"),
    ([0, 1], {"x": torch.ones(2, 3)}, {"y": torch.ones(2)}, "'x' has a value but no weight"),
    ([0, 1], {"x": torch.ones(2, 3)}, {"x": torch.ones(2, 2)}, "does not broadcast"),
    ([0, 1], {"x": torch.ones(2, 3)}, {"x": torch.ones(2, 3, 1)}, "does not broadcast")])
def test_values_and_weights_that_do_not_fit_are_refused(clients, tree, weights, said):
    with pytest.raises(LayoutError, match=said):
        Sums.weighted(clients, tree, weights)


def test_the_first_differing_path_is_the_first_by_name():
    def layout(*shapes: tuple[int, ...]):
        return tuple((path, shape, (), torch.float32) for path, shape in zip("ab", shapes, strict=True))
    assert find_difference(layout((1,), (2,)), layout((3,), (4,))) == ("a", "(1,)", "(3,)")


def test_a_reduced_sum_goes_on_as_the_whole_one_would_and_keeps_no_contribution():
    stacked, weights = values(6), torch.rand(6)

    def of(*clients: int) -> Sums:
        return Sums.weighted(clients, {path: value[list(clients)] for path, value in stacked.items()}, weights[list(clients)])
    whole = of(0, 1, 2, 3, 4, 5)
    reduced = ((of(0, 1).reduce() + of(2)).reduce() + of(3, 4, 5)).reduce()
    assert same_bits(reduced.total(), whole.total()) and reduced.contributions == () and len(reduced.partial) == 1
    assert reduced.layout() == whole.layout() and reduced.simulated_bytes() == whole.simulated_bytes() and make_header(reduced) == make_header(whole)
    assert reduced.reduce() is reduced, "work is done twice"
    both = of(0, 1).reduce() + of(2, 3, 4, 5).reduce()
    assert both.simulated_bytes() == whole.simulated_bytes()
    for path, value in whole.total().values.items():
        np.testing.assert_allclose(both.total().values[path].numpy(), value.numpy(), rtol=1e-12, atol=1e-12)
    assert (of(0).reduce() + of(0)).simulated_bytes()[0] == 2 * of(0).simulated_bytes()[0], "what a client sends twice counts twice"


def test_an_uplink_is_reduced_name_by_name_and_uploads_are_left_alone():
    uploads = Uploads({3: {"x": torch.ones(2)}})
    uplink = Uplink({"sum": Sums.weighted([3], {"x": torch.ones(1, 2)}, torch.ones(1)), "whole": uploads})
    reduced = uplink.reduce()
    assert reduced.pieces["whole"] is uploads and reduced.pieces["sum"].contributions == () and reduced.simulated_bytes() == uplink.simulated_bytes()


def test_what_is_reduced_cannot_be_put_in_client_order_any_more():
    with pytest.raises(LayoutError, match="the sum of 'x' is reduced already; .* must come unsummed"):
        Sums.weighted([3], {"x": torch.ones(1, 2)}, torch.ones(1)).reduce().take_contributions()
