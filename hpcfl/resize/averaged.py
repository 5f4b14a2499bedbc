"""Learned averaging: a classifier whose weights are a weighted sum of several models, every weight of it trainable (FedConv, arXiv 2502.20639)."""
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.resize.derived import Derived, from_channels_last, to_channels_last
from hpcfl.tree import Tree

GRANULARITIES = {"element": lambda shape: prod(shape), "channel": lambda shape: shape[0] if len(shape) else 1, "layer": lambda shape: 1}


class Averaged(Derived):
    """f(x; W'), W' = sum_k (n_k / n) a_k (*) W_k elementwise, with a_k = K softmax_k(l_k) or, unnormalised, a_k = l_k; the logits l are the parameters.

    All parameters of a model lie in one row, so that a step is a softmax and a sum over one matrix (K, P) whatever the layers. `granularity`: an a for each
    element, each output channel, or each parameter tensor. With equal logits W' is the mean weighted by n_k.
    """

    owner: Tensor

    def __init__(self, structure: nn.Module, models: int, granularity: str = "element", normalised: bool = True) -> None:
        super().__init__(structure)
        self.shapes = {path: tuple(parameter.shape) for path, parameter in structure.named_parameters()}
        self.normalised, self.elementwise = normalised, granularity == "element"
        groups = [GRANULARITIES[granularity](shape) for shape in self.shapes.values()]
        sizes = [prod(shape) for shape in self.shapes.values()]
        owner = torch.arange(sum(groups)).repeat_interleave(
            torch.cat([torch.full((count,), size // count) for count, size in zip(groups, sizes, strict=True)]))
        self.logits = nn.Parameter(torch.zeros(models, sum(groups)))                                   # l (K, G)
        self.shares = nn.Parameter(torch.zeros(models, sum(sizes)), requires_grad=False)               # (n_k / n) W_k, (K, P)
        self.register_buffer("owner", None if self.elementwise else owner, persistent=False)           # (P,), the group of each element

    def derive_state(self, models: Sequence[Tree], samples: Sequence[float]) -> Tree:
        """This module's state but the logits, from state_dicts of the full size and their n_k. Running statistics are averaged by n_k, counters begin at 0."""
        weights = [count / sum(samples) for count in samples]
        flat = [torch.cat([to_channels_last(model[path]).flatten() for path in self.shapes]) for model in models]              # (P,) each
        rows = torch.stack([weight * row for weight, row in zip(weights, flat, strict=True)])
        buffers = [path for path, leaf in tree.select_floating(models[0]).items() if path not in self.shapes]
        mean = {path: sum((weight * model[path] for weight, model in zip(weights, models, strict=True)), torch.zeros(())) for path in buffers}
        return self.derive_buffers(mean) | {"shares": rows}

    def coverage(self, shapes: Mapping[str, torch.Size], little: float) -> Tensor:
        """The share of each group of elements that lies within the leading part of these shapes, (G,) in [little, 1]."""
        inside = []
        for path, shape in self.shapes.items():
            marks = torch.zeros(shape)
            marks[tuple(map(slice, shapes[path]))] = 1
            inside.append(to_channels_last(marks).flatten())
        marks = torch.cat(inside)                                                                      # (P,)
        if not self.elementwise:
            owner, zeros = self.owner.cpu(), torch.zeros(self.logits.shape[1])
            marks = zeros.index_add(0, owner, marks) / zeros.index_add(0, owner, torch.ones_like(marks))
        return marks.clamp(min=little)

    def derive_parameters(self) -> Tree:
        """W', differentiable with respect to the logits."""
        a = len(self.logits) * self.logits.softmax(0) if self.normalised else self.logits              # (K, G)
        flat = ((a if self.elementwise else a[:, self.owner]) * self.shares).sum(0)                    # (P,)
        pieces = flat.split([prod(shape) for shape in self.shapes.values()])
        return {path: from_channels_last(piece, shape) for (path, shape), piece in zip(self.shapes.items(), pieces, strict=True)}
