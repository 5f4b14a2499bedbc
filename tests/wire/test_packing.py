"""Trees travel in one buffer: each begins at a line, the bits arrive, and layouts alone say how long the buffer is."""
import pytest
import torch

from hpcfl import tree
from hpcfl.wire.packing import LINE, allocate, count_lines, pack, unpack

TREES = [{"half": torch.full((3,), 1.5, dtype=torch.bfloat16), "whole": torch.tensor(7)}, {}, {"none": torch.zeros(0, 2)},
         {"strided": torch.arange(20.0).view(4, 5).T, "flags": torch.tensor([True, False])}]


@pytest.mark.parametrize("trees", [[], TREES[:1], TREES])
def test_packed_trees_come_out_with_the_same_bits(trees):
    layouts = [tree.layout(each) for each in trees]
    buffer = pack(trees)
    assert buffer.dtype == torch.uint8 and len(buffer) == LINE * sum(map(count_lines, layouts)) == len(allocate(layouts))
    assert all(tree.equal(found, each) for found, each in zip(unpack(buffer, layouts), trees, strict=True))


def test_what_comes_out_are_views_of_the_buffer():
    buffer = pack([{"x": torch.ones(2)}])
    unpack(buffer, [tree.layout({"x": torch.ones(2)})])[0]["x"].zero_()
    assert not buffer[:8].any()


@pytest.mark.parametrize(("floats", "lines"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_a_tree_takes_whole_lines(floats, lines):
    assert count_lines(tree.layout({"x": torch.zeros(floats)})) == lines


def test_a_second_tree_begins_at_a_line():
    buffer = pack([{"x": torch.ones(1, dtype=torch.uint8)}, {"x": torch.full((1,), 2, dtype=torch.uint8)}])
    assert buffer[0] == 1 and buffer[LINE] == 2
