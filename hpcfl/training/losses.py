"""Losses that several methods share, of one client and in plain torch; `fit` computes them for whole Groups."""
import torch.nn.functional as F
from torch import Tensor

from hpcfl.tree import Tree


def cross_entropy(modules, batch: Tree, context: Tree) -> Tensor:
    """CE(f(x), y), mean over the batch."""
    return F.cross_entropy(modules.model(batch["x"]), batch["y"])


def prototype_distance(z: Tensor, y: Tensor, prototypes: Tensor, has: Tensor, weight: Tensor) -> Tensor:
    """Mean over batch and features of weight * (z - prototype of y)^2; images whose class has no prototype count as zero.

    z (B, p), y (B,), prototypes (C, p), has (C,) bool, weight (p,) or (C, p) with mean 1. FedProto's regulariser with weight = 1, FedVTC's alignment
    (arXiv 2508.01669) with weight = the normalised inverse variance.
    """
    weights = weight[y] if weight.dim() == 2 else weight                                     # (B, p) or (p,)
    return (has[y].unsqueeze(1) * weights * (z - prototypes[y]).square()).mean()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities (n, C), mean over the rows; written out, because torch's own has no rule for vmap."""
    return (p.exp() * (p - q)).sum(1).mean()
