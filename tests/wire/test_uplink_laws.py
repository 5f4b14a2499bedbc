"""The laws of `+`: uplinks may be added in any order and grouping, nothing is the zero, and what is reduced on the way gives the same total."""
from functools import reduce
from operator import add

import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcfl.wire.uplink import Sums, Total, Uplink, Uploads
from tests.support.laws import LAW

NAMES, SHAPES = ("model", "moments"), {"weight": (2, 3), "scale": (), "none": (0, 2)}


@st.composite
def uplinks(draw, exact: bool) -> list[Uplink]:
    """What each of a few clients sends up; `exact`: whole numbers, whose sums no order rounds."""
    found = []
    for client in range(draw(st.integers(1, 5))):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 32 - 1)))
        number = draw(st.integers(0, 1000) if exact else st.floats(0, 1e3))

        def leaf(shape: tuple[int, ...], generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randint(-999, 1000, (1, *shape), generator=generator).float() if exact else torch.randn(1, *shape, generator=generator)
        sums = {name: Sums.weighted([client], {path: leaf(shape) for path, shape in SHAPES.items()}, torch.tensor([float(number)]))
                for name in draw(st.sets(st.sampled_from(NAMES)))}
        whole = {"uploads": Uploads({client: {"x": leaf((2,))}})} if draw(st.booleans()) else {}
        found.append(Uplink({**sums, **whole}))
    return found


def same(one: Uplink, other: Uplink) -> bool:
    """Whether two Uplinks come to the same bits at the server, and cost the same."""
    def ends(uplink: Uplink) -> dict[str, Total | dict]:
        return {name: piece.total() if isinstance(piece, Sums) else dict(sorted(piece.trees.items())) for name, piece in uplink.pieces.items()}

    def alike(a: Total | dict, b: Total | dict) -> bool:
        if isinstance(a, Total) and isinstance(b, Total):
            return all(torch.equal(a.values[path], b.values[path]) and torch.equal(a.counts[path], b.counts[path]) for path in SHAPES)
        return a.keys() == b.keys() and all(torch.equal(a[client]["x"], b[client]["x"]) for client in a)
    first, second = ends(one), ends(other)
    return first.keys() == second.keys() and all(alike(first[name], second[name]) for name in first) and one.simulated_bytes() == other.simulated_bytes()


@LAW
@given(uplinks(exact=False), st.randoms(use_true_random=False))
def test_the_order_of_uplinks_changes_no_bit(found, chance):
    shuffled = chance.sample(found, len(found))
    assert same(reduce(add, found), reduce(add, shuffled))


@LAW
@given(uplinks(exact=False), st.integers(0, 5))
def test_the_grouping_of_uplinks_changes_no_bit(found, cut):
    assert same(reduce(add, found), reduce(add, found[:cut], Uplink()) + reduce(add, found[cut:], Uplink()))


@LAW
@given(uplinks(exact=False))
def test_the_empty_uplink_is_the_zero(found):
    whole = reduce(add, found)
    assert same(whole + Uplink(), whole) and same(Uplink() + whole, whole)


@LAW
@given(uplinks(exact=True), st.lists(st.booleans(), min_size=5, max_size=5))
def test_what_is_reduced_on_the_way_gives_the_same_total(found, stops):
    reduced = Uplink()
    for each, stop in zip(found, stops, strict=False):
        reduced = (reduced + each).reduce() if stop else reduced + each
    assert same(reduced, reduce(add, found))
