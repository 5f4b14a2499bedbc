"""Tree, the one currency: a flat dict from path to tensor. Models, messages, client state and checkpoints are Trees."""
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Tree = dict[str, Tensor]
Layout = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]      # (path, shape, dtype) in packing order
Marks = dict[str, tuple[Tensor, int]]                              # path -> (leaf, how often it was written in place)


def nbytes(tree: Tree) -> int:
    """Payload of a Tree in bytes: the size of one contiguous message of it."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.values())


def join(**parts: Tree) -> Tree:
    """One Tree from several: `join(model=a, generator=b)` has the paths model/... and generator/..."""
    return {f"{name}/{path}": leaf for name, part in parts.items() for path, leaf in part.items()}


def part(tree: Mapping[str, T], name: str) -> dict[str, T]:
    """The sub-Tree below `name/`, its paths without that prefix; empty where nothing is there."""
    prefix = f"{name}/"
    return {path[len(prefix):]: leaf for path, leaf in tree.items() if path.startswith(prefix)}


def root(path: str) -> str:
    """The part of a Tree that a path belongs to: what comes before its first slash."""
    return path.partition("/")[0]


def transform(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    """The Tree of function(leaf)."""
    return {path: function(leaf) for path, leaf in tree.items()}


def clone(tree: Tree) -> Tree:
    """A copy that shares no memory with the original."""
    return transform(tree, lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format))


def to(tree: Tree, device: torch.device | str) -> Tree:
    """The Tree on a device; leaves already there are shared, not copied. Only copies to a GPU may overlap: the host must not read half a copy."""
    return transform(tree, lambda leaf: leaf.to(device, non_blocking=torch.device(device).type != "cpu"))


def select_floating(tree: Tree) -> Tree:
    """The leaves that may be averaged: integer buffers are carried, never averaged."""
    return {path: leaf for path, leaf in tree.items() if leaf.is_floating_point()}


def stack(trees: Sequence[Tree]) -> Tree:
    """K Trees of one layout as one Tree with a leading client axis (K, ...)."""
    return {path: torch.stack([tree[path] for tree in trees]) for path in trees[0]}


def row(tree: Tree, index: int) -> Tree:
    """Client `index` of a stacked Tree, as views."""
    return transform(tree, lambda leaf: leaf[index])


def rows(tree: Tree, indices: Sequence[int]) -> Tree:
    """The clients at `indices` of a stacked Tree, copied."""
    return {path: leaf[torch.as_tensor(indices, device=leaf.device)] for path, leaf in tree.items()}


def repeat(tree: Tree, times: int) -> Tree:
    """One Tree given to `times` clients: (K, ...), each row with memory of its own."""
    return transform(tree, lambda leaf: leaf.unsqueeze(0).repeat(times, *[1] * leaf.dim()))


def layout(tree: Tree) -> Layout:
    """Paths, shapes and types in packing order: widest element first, so that every leaf lies aligned without padding."""
    order = sorted(tree, key=lambda path: (-tree[path].element_size(), path))
    return tuple((path, tuple(tree[path].shape), tree[path].dtype) for path in order)


def digest(described: Sequence[object]) -> str:
    """A short name of a layout: equal layouts, and in practice only these, share it."""
    return hashlib.blake2b(repr(described).encode(), digest_size=16).hexdigest()


def fingerprints(stacked: Tree) -> list[str]:
    """A short name of each row of a stacked Tree (K, ...): rows of the same paths, types and bits, and in practice only these, share it."""
    alike = [(path, leaf.shape[1:], leaf.dtype) for path, leaf in sorted(stacked.items())]
    head = hashlib.blake2b(repr(alike).encode(), digest_size=16)
    hashes = [head.copy() for _ in range(len(next(iter(stacked.values()), ())))]
    for _, leaf in sorted(stacked.items()):
        for each, line in zip(hashes, leaf.detach().unsqueeze(-1).flatten(1).contiguous().view(torch.uint8).cpu().numpy(), strict=True):
            each.update(line)
    return [each.hexdigest() for each in hashes]


def fingerprint(tree: Tree) -> str:
    """The short name of one Tree that `fingerprints` gives a row."""
    return fingerprints(transform(tree, lambda leaf: leaf.unsqueeze(0)))[0]


def unpack(buffer: Tensor, described: Layout) -> Tree:
    """The Tree whose leaves are views of `buffer` (uint8, contiguous) in the given layout."""
    tree, start = {}, 0
    for path, shape, dtype in described:
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        tree[path] = buffer[start:stop].view(dtype).view(shape)
        start = stop
    return tree


def marks(tree: Tree) -> Marks:
    """Every leaf and how often it was written in place so far, to see later by `find_changed` what was done to the Tree."""
    return {path: (leaf, _writes(leaf)) for path, leaf in tree.items()}


def find_changed(before: Marks, tree: Tree) -> set[str]:
    """The paths under which a Tree no longer has the very tensor that it had, or that tensor was written in place since.

    torch counts the writes of its own operations, through views too; writes by NumPy or `.data` cannot be seen.
    """
    return {path for path in before.keys() | tree.keys()
            if path not in tree or path not in before or tree[path] is not before[path][0] or _writes(tree[path]) != before[path][1]}


def number(described: Sequence) -> int:
    """A number for what `repr` says of something; it fits into int64, in which checkpoints keep it."""
    return int.from_bytes(hashlib.blake2b(repr(described).encode(), digest_size=8).digest(), "big") >> 1


def _writes(leaf: Tensor) -> int:
    return 0 if leaf.is_inference() else leaf._version             # torch does not count writes into tensors of inference mode


def equal(one: Tree, other: Tree) -> bool:
    """Same paths, types and bits."""
    return one.keys() == other.keys() and all(one[path].dtype == other[path].dtype and torch.equal(one[path], other[path]) for path in one)
