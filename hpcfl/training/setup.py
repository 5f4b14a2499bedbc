"""Setup: what a training has to know before its first step, worked out from Group, modules and Turns, or refused where they do not fit."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hpcfl.errors import LayoutError
from hpcfl.streams import Stream, sow
from hpcfl.training.group import OPTIMIZER, Group
from hpcfl.training.turns import Batches, Modules, Turn, describe_value
from hpcfl.tree import Tree, root
from hpcfl.wording import leaf_text

Forward = Callable[..., tuple[Tensor, Tree]]                       # loss and scalars; its arguments are those of engines.forward_one


@dataclass(frozen=True)
class Setup:
    """What fit knows before the first step; both engines read it, neither changes it."""

    modules: Modules
    turns: tuple[Turn, ...]
    own: dict[str, str]                                            # the tensors that each client has of its own: state path -> dotted name below Modules
    trained: tuple[tuple[str, ...], ...]                           # per Turn, the state paths that it updates
    slots: tuple[dict[str, list[str]], ...]                        # per Turn, slot -> one path per updated parameter
    buffers: tuple[str, ...]                                       # state paths that modules in train mode write by themselves
    returned: tuple[str, ...]                                      # state paths that change and go back to the caller
    shared: Tree                                                   # dotted name -> tensor of the modules that the state does not hold
    forward_one: Forward                                           # loss () and scalars of one client
    forward_stacked: Forward                                       # losses (K',) and scalars of stacked clients
    context: Tree
    streams: Callable[[int], Stream]                               # client -> the stream that its networks, losses and batches draw from by global generators
    channels_last: frozenset[str]                                  # state paths of the convolutions that the sequential engine lays out so
    images_last: bool                                              # whether the sequential engine lays out images so
    where: str                                                     # of the training, in errors
    member: str                                                    # what a row of the Group is, in errors
    origin: str                                                    # what made the state that the rows begin with, in errors

    def bind(self, number: int, state: Tree) -> tuple[Tree, tuple[Tensor, ...]]:
        """What the loss of one Turn reads, {dotted name: tensor of `state`}, and those of its tensors that are differentiated."""
        leaves = {path: state[path].detach().requires_grad_() for path in self.trained[number]}
        return {name: leaves.get(path, state[path]) for path, name in self.own.items()}, tuple(leaves.values())

    def draw_batches(self, batches: Batches, client: int, seeds: Iterator[int]) -> Iterator[Tree]:
        """A client's batches; if they draw from global generators, these were sown before the first. Raises: LayoutError for what is no batch."""
        sow(next(seeds))
        given = batches(client)
        if not isinstance(given, Iterable):
            raise LayoutError(f"{self.where}: the batches of {self.member} {client} are {describe_value(given)}, wanted something to iterate over")
        for batch in given:
            if not isinstance(batch, Mapping) or not all(isinstance(leaf, Tensor) for leaf in batch.values()):
                raise LayoutError(f"{self.where}: a batch of {self.member} {client} is {describe_value(batch)}, "
                                  "wanted a dict of tensors, for example {'x': images, 'y': labels}")
            yield batch

    @contextmanager
    def naming(self, turn: Turn, clients: Sequence[int]) -> Iterator[None]:
        """Have an error in the block name the loss and the clients: a LayoutError in its text, any other in a note."""
        def whose_loss() -> str:
            return f"{self.where}: the loss {turn.loss_name} of {self.member} {', '.join(map(str, clients))}"
        try:
            yield
        except LayoutError as fault:
            raise LayoutError(f"{whose_loss()} {fault}") from None
        except Exception as fault:                                 # noted, and raised as it is
            fault.add_note(whose_loss())
            raise


def set_up(group: Group, modules: Mapping[str, nn.Module], turns: Sequence[Turn], keep_optimizer: bool, channels_last: bool, where: str,
           **settings: Any) -> Setup:
    """The Setup of a training; the arguments are those of `fit`, `settings` the fields of Setup that nothing needs to be worked out for.

    Raises: LayoutError where Group, modules and Turns do not fit each other.
    """
    wrapped = Modules(modules)
    everything = dict([*wrapped.named_parameters(remove_duplicate=False), *wrapped.named_buffers(remove_duplicate=False)])
    if len({id(tensor) for tensor in everything.values()}) < len(everything):
        raise LayoutError(f"{where}: modules {', '.join(modules)}: two names share one parameter or buffer; give each use a tensor of its own")
    own = {f"{name}/{path}": f"{name}.{path}" for name in modules for path in _find_held(group, name, modules[name], where)}
    all_buffers = {name for name, _ in wrapped.named_buffers()}
    fixed = {name for name, tensor in everything.items() if not tensor.requires_grad}
    parameters = [path for path, name in own.items() if name not in all_buffers and name not in fixed]
    trained = tuple(_find_trained(group, turn, parameters, where) for turn in turns)
    slots = tuple({slot: [_slot_path(OPTIMIZER if keep_optimizer else f"turn {number}", slot, path) for path in trained[number]]
                   for slot in turn.optimizer.slots} for number, turn in enumerate(turns))
    kept_slots = [path for turn in slots for paths in turn.values() for path in paths] if keep_optimizer else []
    if len(set(kept_slots)) < len(kept_slots):
        raise LayoutError(f"{where}: keep_optimizer with two Turns that train one parameter: their optimiser states would have one path")
    names = {name for turn in turns for name in turn.trains}
    buffers = tuple(path for path, name in own.items() if name in all_buffers and root(path) in names)
    held = set(own.values())
    shared = {name: tensor.detach().to(group.device) for name, tensor in everything.items() if name not in held}
    returned = tuple(dict.fromkeys([*(path for paths in trained for path in paths), *buffers, *kept_slots]))
    convolutions = {f"{name}.weight" for name, module in wrapped.named_modules() if isinstance(module, nn.Conv2d)} if channels_last else set()
    last = frozenset(path for path, name in own.items() if name in convolutions)
    return Setup(wrapped, tuple(turns), own, trained, slots, buffers, returned, shared, channels_last=last, images_last=channels_last, where=where, **settings)


def _find_held(group: Group, name: str, module: nn.Module, where: str) -> list[str]:
    """The names of those tensors of a module that the Group holds: all of its state_dict, or none."""
    held = group.part(name)
    wanted = {path: leaf_text(tensor.shape, tensor.dtype) for path, tensor in module.state_dict().items()} if held else {}
    for path in dict.fromkeys([*wanted, *held]):
        got, want = leaf_text(held[path].shape[1:], held[path].dtype) if path in held else "missing", wanted.get(path, "missing")
        if got != want:
            raise LayoutError(f"{where}: group {group.architecture}: '{name}/{path}' of a client is {got}, in the module it is {want}")
    return list(wanted)


def _find_trained(group: Group, turn: Turn, parameters: Sequence[str], where: str) -> tuple[str, ...]:
    """The state paths that one Turn updates."""
    there = {root(path) for path in parameters}
    if missing := set(turn.trains) - there:
        raise LayoutError(f"{where}: a Turn trains {sorted(missing)}, but of the given modules group {group.architecture} holds only {sorted(there)}")
    paths = tuple(path for path in parameters if root(path) in turn.trains and (turn.scope is None or turn.scope(path)))
    if not paths:
        raise LayoutError(f"{where}: the scope of the Turn that trains {turn.trains} leaves no parameter of group {group.architecture}")
    return paths


def _slot_path(first: str, slot: str, path: str) -> str:
    module, _, parameter = path.partition("/")
    return f"{first}/{module}/{slot}/{parameter}"
