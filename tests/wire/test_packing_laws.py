"""Packing and unpacking is the identity, whatever the Trees: types, shapes, empty leaves, no leaf at all."""
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcfl import tree
from hpcfl.wire.packing import LINE, count_lines, pack, unpack
from tests.support.laws import LAW

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64)
PATHS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def leaves(draw) -> torch.Tensor:
    """A leaf of any bits, NaN and infinity among them."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 5), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 32 - 1)))
    size = torch.Size(shape).numel() * dtype.itemsize
    flat = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    leaf = flat.view(dtype).view(shape)
    return leaf.transpose(0, 1) if leaf.dim() >= 2 and draw(st.booleans()) else leaf


def bits(leaf: torch.Tensor) -> bytes:
    return leaf.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@LAW
@given(st.lists(st.dictionaries(PATHS, leaves(), max_size=4), max_size=4))
def test_unpacked_trees_are_those_that_were_packed(trees):
    layouts = [tree.layout(each) for each in trees]
    buffer = pack(trees)
    assert len(buffer) == LINE * sum(map(count_lines, layouts))
    for given_, got in zip(trees, unpack(buffer, layouts), strict=True):
        assert got.keys() == given_.keys() and tree.layout(got) == tree.layout(given_)
        assert all(bits(got[path]) == bits(leaf) for path, leaf in given_.items())
