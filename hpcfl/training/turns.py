"""Turns: what a batch does first, second, ...: the losses of a training, the modules they work with, and all that is known before the first step."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from hpcfl.errors import LayoutError
from hpcfl.streams import Stream, sow
from hpcfl.training.optimizers import Optimizer
from hpcfl.tree import Tree

END = object()                                                     # of a client's batches
Forward = Callable[..., tuple[Tensor, Tree]]
Batches = Callable[[int], Iterable[Tree]]                          # client -> its batches, on the Group's device, their random draws in them


class Modules(nn.Module):
    """The modules a loss works with, as attributes: `modules.model.features(x)`."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, loss: Loss, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
        """The loss () of one client on one batch and what else it measured: all that an engine differentiates, compiles or vmaps."""
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
    """What a batch does first, second, ...: a loss, the modules it trains, and their optimiser.

    `scope(path)` picks the parameters that are trained ("model/head.weight"); the others get neither update nor gradient, and layers that
    hold only such parameters are in eval mode, so that their running statistics stay as they are. A parameter that requires no gradient is never trained.
    """

    trains: tuple[str, ...]
    loss: Loss
    optimizer: Optimizer
    scope: Callable[[str], bool] | None = None

    @property
    def named(self) -> str:
        """The loss, in errors."""
        return getattr(self.loss, "__qualname__", type(self.loss).__name__)


@dataclass(frozen=True)
class Setup:
    """What fit has found out before the first step."""

    modules: Modules
    turns: tuple[Turn, ...]
    own: dict[str, str]                                            # every client's own tensors: state path -> dotted name below Modules
    trained: tuple[tuple[str, ...], ...]                           # per Turn, the state paths it updates
    slots: tuple[dict[str, list[str]], ...]                        # per Turn, slot -> one path per updated parameter
    buffers: tuple[str, ...]                                       # state paths that modules in train mode write by themselves
    returned: tuple[str, ...]                                      # state paths that change and go back to the caller
    shared: Tree                                                   # dotted name -> tensor of the modules that the state does not hold
    alone: Forward                                                 # loss and scalars of one client
    stacked: Forward                                               # of clients together
    context: Tree
    streams: Callable[[int], Stream]                               # client -> what its networks, losses and batches draw from where they use global generators
    channels_last: frozenset[str]                                  # state paths of the convolutions that the sequential engine lays out so
    images_last: bool                                              # whether it lays out images so
    where: str
    member: str                                                    # what a row of the Group is, in errors
    origin: str                                                    # what made that with which the rows begin, in errors

    def bind(self, number: int, state: Tree) -> tuple[Tree, tuple[Tensor, ...]]:
        """What the loss of one Turn reads, {dotted name: tensor of `state`}, and those of its tensors that are differentiated."""
        leaves = {path: state[path].detach().requires_grad_() for path in self.trained[number]}
        return {name: leaves.get(path, state[path]) for path, name in self.own.items()}, tuple(leaves.values())

    def draw_batches(self, batches: Batches, client: int, seeds: Iterator[int]) -> Iterator[Tree]:
        """A client's batches; should they draw from global generators, these go on from where they were sown. Raises: LayoutError for what is no batch."""
        sow(next(seeds))
        given = batches(client)
        if not isinstance(given, Iterable):
            raise LayoutError(f"{self.where}: the batches of {self.member} {client} are {describe_value(given)}, wanted something to iterate over")
        source = iter(given)
        while True:
            batch = next(source, END)
            if batch is END:
                return
            if not isinstance(batch, Mapping) or not all(isinstance(leaf, Tensor) for leaf in batch.values()):
                raise LayoutError(f"{self.where}: a batch of {self.member} {client} is {describe_value(batch)}, "
                                  "wanted a dict of tensors, for example {'x': images, 'y': labels}")
            yield dict(batch)

    @contextmanager
    def naming(self, turn: Turn, clients: Sequence[int]) -> Iterator[None]:
        """Whatever goes wrong inside the block says at whose loss and where."""
        def who() -> str:
            return f"{self.where}: the loss {turn.named} of {self.member} {', '.join(map(str, clients))}"
        try:
            yield
        except LayoutError as fault:
            raise LayoutError(f"{who()} {fault}") from None
        except Exception as fault:                                 # told where it happened, and raised as it is
            fault.add_note(who())
            raise


def describe_value(given: object) -> str:
    """What somebody gave who was to give something else."""
    if isinstance(given, Tensor):
        return f"a tensor {tuple(given.shape)} of {str(given.dtype).removeprefix('torch.')}"
    if isinstance(given, Mapping):
        return f"a {type(given).__name__} of {', '.join(f'{name}: {type(value).__name__}' for name, value in given.items())}"
    if isinstance(given, tuple | list):
        return f"a {type(given).__name__} of {', '.join(type(value).__name__ for value in given)}"
    return f"{given!r:.60} ({type(given).__name__})"
