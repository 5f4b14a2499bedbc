"""Slices: the channels of a full-size network that a narrower one keeps (leading ones or a rolling window), and leaves cut out and put back."""
import copy
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.errors import JobError, LayoutError
from hpcfl.models.classifier import Model
from hpcfl.tree import Tree

Axes = dict[str, tuple[Tensor, ...]]                               # path -> of each axis the kept indices of the full-size leaf, ascending

MIXING = (nn.Conv2d, nn.Linear)                                    # layers that make new channels out of those they read
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)               # layers that keep the channels they read


def mark_window(full: int, kept: int, shift: int = 0, blocks: int = 1) -> Tensor:
    """Which of `full` channels are kept, (full,) bool: (shift + i) mod full for i < kept, in each of `blocks` equal blocks (attention heads).

    shift = 0: the leading ones (HeteroFL, arXiv 2010.01264); shift = round: FedRolex's rolling window (arXiv 2212.01548, section 3.2).
    """
    marks = torch.zeros(full // blocks, dtype=torch.bool)
    marks[(shift + torch.arange(kept // blocks)) % len(marks)] = True
    return marks.repeat(blocks)


def find_axes(full: Model, small: Model, shift: int = 0) -> Axes:
    """The channels that `small` keeps of every leaf of `full`, two widths of one model.

    Every layer that makes channels keeps a window of them. To find what the next layers read, one image passes through the full-size network: each such layer
    gives out 1 in the channels that it keeps and 0 in the others, and the inputs that arrive positive are kept. So concatenations, flattened maps and
    residual sums need no rule of their own.
    Raises: JobError where only one width has a projection to models.feature_size; LayoutError where windows do not meet, in a sum for example.
    """
    sizes, wanted = ({path: tuple(leaf.shape) for path, leaf in model.state_dict().items()} for model in (full, small))
    if alone := sorted(sizes.keys() ^ wanted.keys()):
        raise JobError(f"'{alone[0]}' is in only one of two widths of a model: models.feature_size = {full.feature_size} is the size at which one of them "
                       "ends anyway, so that it needs no projection; choose another models.feature_size, or 0 for each model's own")
    found: dict[str, tuple[Tensor, ...]] = {}
    marked = copy.deepcopy(full).cpu().eval()
    for name, module in marked.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, MIXING):
            parent = marked.get_submodule(name.rpartition(".")[0])
            module.register_forward_hook(partial(_mix, found, prefix, wanted[f"{prefix}weight"][0], shift, _count_blocks(parent, module)))
        elif isinstance(module, NORMS):
            module.register_forward_hook(partial(_pass, found, prefix))
        else:
            for own, parameter in module.named_parameters(recurse=False):
                found[prefix + own] = tuple(mark_window(n, m, shift) for n, m in zip(parameter.shape, wanted[prefix + own], strict=True))
                parameter.data = torch.ones_like(parameter) * prod(_to_index(found[prefix + own]))
    with torch.no_grad():
        marked(torch.ones(1, *full.shape))
    for path, shape in wanted.items():
        if tuple(int(marks.sum()) for marks in found[path]) != shape:
            raise LayoutError(f"'{path}': channels that arrive are {tuple(int(marks.sum()) for marks in found[path])} of {sizes[path]}, the narrower "
                              f"network has {shape}; networks to be sliced must add and join channels of one window each")
    return {path: tuple(marks.nonzero().flatten() for marks in found[path]) for path in wanted}


def take(state: Tree, kept: Axes) -> Tree:
    """The slices of the leaves of `state`; a leaf that is kept whole is shared, not copied."""
    return {path: _take(leaf, kept[path]) for path, leaf in state.items()}


def add_to(out: Tree, slices: Tree, kept: Axes) -> None:
    """Add slices to the full-size leaves of `out`, each where it came from."""
    for path, leaf in slices.items():
        out[path][_to_index(kept[path])] += leaf


def put(into: Tree, slices: Tree, kept: Axes) -> Tree:
    """A copy of the full-size leaves with the slices written in where they came from."""
    full = tree.clone(into)
    for path, leaf in slices.items():
        full[path][_to_index(kept[path])] = leaf.to(full[path].dtype)
    return full


def _mix(found: dict, prefix: str, size: int, shift: int, blocks: int, layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    arrived = _find_arrived(inputs[0])
    depthwise = getattr(layer, "groups", 1) > 1
    channels = arrived if depthwise else mark_window(len(layer.weight), size, shift, blocks)
    rest = [torch.ones(n, dtype=torch.bool) for n in layer.weight.shape[2:]]
    found[f"{prefix}weight"] = (channels, torch.ones(1, dtype=torch.bool) if depthwise else arrived, *rest)
    if layer.bias is not None:
        found[f"{prefix}bias"] = (channels,)
    return torch.zeros_like(output) + _along_channels(channels, output)


def _pass(found: dict, prefix: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    for own, leaf in layer.state_dict().items():
        found[prefix + own] = (_find_arrived(inputs[0]),) * leaf.dim()  # the count of batches has no axis
    return inputs[0]


def _count_blocks(parent: Any, layer: nn.Module) -> int:
    """Attention heads between which the channels of a query, key or value layer are split."""
    return parent.heads if layer in [getattr(parent, name, None) for name in ("q", "k", "v")] else 1


def _find_arrived(x: Tensor) -> Tensor:
    channels = x.transpose(1, -1) if x.dim() == 4 else x           # maps (1, C, H, W), tokens (1, T, D) or features (1, D)
    return (channels > 0).flatten(0, -2).any(0)


def _along_channels(marks: Tensor, like: Tensor) -> Tensor:
    return marks.view(1, -1, 1, 1) if like.dim() == 4 else marks


def _to_index(kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One tensor per axis, shaped so that together they span all axes."""
    return tuple(each.view(*[1] * axis, -1, *[1] * (len(kept) - 1 - axis)) for axis, each in enumerate(kept))


def _take(leaf: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
    for axis, indices in enumerate(kept):
        if len(indices) < leaf.shape[axis]:
            leaf = leaf.index_select(axis, indices.to(leaf.device))
    return leaf
