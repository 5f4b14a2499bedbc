"""Packing: Trees as one host buffer of whole cache lines, the way they travel."""
from collections.abc import Sequence

import torch
from torch import Tensor

from hpcfl import tree
from hpcfl.tree import Layout, Tree

LINE = 64                                                          # bytes; buffers travel in cache lines: Trees lie aligned, 2^31 lines are 128 GiB


def pack(trees: Sequence[Tree]) -> Tensor:
    """Trees as one host buffer, (bytes,) uint8, in which each begins at a line; pinned where leaves come from a GPU."""
    layouts = [tree.layout(each) for each in trees]
    buffer = allocate(layouts, pinned=any(leaf.is_cuda for each in trees for leaf in each.values()))
    for each, views in zip(trees, unpack(buffer, layouts), strict=True):
        for path, view in views.items():
            view.copy_(each[path].detach())
    return buffer


def unpack(buffer: Tensor, layouts: Sequence[Layout]) -> list[Tree]:
    """The Trees of a buffer, their leaves views of it."""
    pieces = buffer.split([count_lines(layout) * LINE for layout in layouts])
    return [tree.unpack(piece, layout) for piece, layout in zip(pieces, layouts, strict=True)]


def allocate(layouts: Sequence[Layout], pinned: bool = False) -> Tensor:
    """A buffer for Trees of these layouts."""
    return torch.empty(sum(map(count_lines, layouts)) * LINE, dtype=torch.uint8, pin_memory=pinned)


def count_lines(layout: Layout) -> int:
    """How many lines a Tree of this layout takes."""
    return -(-sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in layout) // LINE)
