"""Turns: what a batch does first, second, ...: the loss of each turn, the modules that it works with, and the optimiser."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hpcfl.errors import LayoutError
from hpcfl.training.optimizers import Optimizer
from hpcfl.tree import Tree

Batches = Callable[[int], Iterable[Tree]]                          # client -> its batches, on the Group's device, their random draws in them


class Modules(nn.Module):
    """The modules that a loss works with, as attributes: `modules.model.features(x)`."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, loss: Loss, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
        """The loss () of one client on one batch, and what else it measured: all that an engine differentiates, compiles or vmaps.

        Raises: LayoutError for a loss that gives something else.
        """
        result = loss(self, batch, context)
        value, scalars = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise LayoutError(f"returned {describe_value(value)}; wanted a floating-point tensor of shape (), or that and a dict of what else it measured")
        if value.dim():
            raise LayoutError(f"returned shape {tuple(value.shape)}; wanted a scalar: take its mean or sum over the batch")
        if not isinstance(scalars, Mapping):
            raise LayoutError(f"returned {describe_value(scalars)} beside its value; wanted a dict of what else it measured, {{name: tensor of shape ()}}")
        for name, scalar in scalars.items():
            if not isinstance(scalar, Tensor) or scalar.dim():
                raise LayoutError(f"measured '{name}' as {describe_value(scalar)}; wanted a tensor of shape ()")
        return value, dict(scalars)


Loss = Callable[[Modules, Tree, Tree], Tensor | tuple[Tensor, Tree]]       # (modules, batch, context) -> loss () or (loss, {name: scalar ()})


@dataclass(frozen=True)
class Turn:
    """What a batch does once: a loss, the modules that it trains, and their optimiser.

    `scope(path)` picks the parameters that are trained ("model/head.weight"). The others get neither update nor gradient, and layers that hold only
    such parameters are in eval mode, so that their running statistics stay as they are. A parameter that requires no gradient is never trained.
    """

    trains: tuple[str, ...]
    loss: Loss
    optimizer: Optimizer
    scope: Callable[[str], bool] | None = None

    @property
    def loss_name(self) -> str:
        """What errors call the loss."""
        return getattr(self.loss, "__qualname__", type(self.loss).__name__)


def describe_value(given: object) -> str:
    """What somebody gave in place of something else, for errors."""
    if isinstance(given, Tensor):
        return f"a tensor {tuple(given.shape)} of {str(given.dtype).removeprefix('torch.')}"
    if isinstance(given, Mapping):
        return f"a {type(given).__name__} of {', '.join(f'{name}: {type(value).__name__}' for name, value in given.items())}"
    if isinstance(given, tuple | list):
        return f"a {type(given).__name__} of {', '.join(type(value).__name__ for value in given)}"
    return f"{given!r:.60} ({type(given).__name__})"
