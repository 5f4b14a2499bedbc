"""Engines: how fit takes its steps, client after client or all clients at a time."""
from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from hpcfl import tree
from hpcfl.errors import LayoutError
from hpcfl.streams import sow, sow_and_watch
from hpcfl.training.group import Group
from hpcfl.training.meter import Meter
from hpcfl.training.optimizers import Slots, begin_slot, clip_gradients
from hpcfl.training.setup import Setup
from hpcfl.training.turns import Batches, Loss, Modules, Turn
from hpcfl.tree import Tree

log = logging.getLogger(__name__)

Trained = tuple[Tree, list[dict[str, float]]]                      # what training changed (K, ...), and each client's mean metrics


def run_sequential(setup: Setup, group: Group, batches: Batches) -> Trained:
    """Train client after client, each in the same memory: rows of stacked leaves are aligned differently, and the bits must not depend on the row."""
    state = {path: _allocate_row(group.state[path], path in setup.channels_last) for path in setup.own}
    bounds = []
    for number, turn in enumerate(setup.turns):
        parameters = [state[path] for path in setup.trained[number]]
        slots = {slot: [begin_slot(slot, parameter) for parameter in parameters] for slot in turn.optimizer.slots}
        bounds.append(BoundTurn(turn, *setup.bind(number, state), parameters, slots))
    for bound, paths in zip(bounds, setup.slots, strict=True):
        state |= {path: tensor for slot in paths for path, tensor in zip(paths[slot], bound.slots[slot], strict=True)}
    outcome = {path: state[path].new_empty(len(group.clients), *state[path].shape) for path in setup.returned}
    metrics = []
    for index, client in enumerate(group.clients):
        for path, row in state.items():
            row.copy_(group.state[path][index]) if path in group.state else row.zero_()
        meter, seeds = Meter([client]), setup.streams(client).seeds()
        for batch in setup.draw_batches(batches, client, seeds):
            batch = tree.transform(batch, _to_channels_last) if setup.images_last else batch
            for bound in bounds:
                with setup.naming(bound.turn, [client]):
                    sow(next(seeds))
                    meter.add(bound.update(*setup.forward_one(setup.modules, bound.turn.loss, bound.own, setup.shared, batch, setup.context)), (0,))
        for path, rows in outcome.items():
            rows[index].copy_(state[path])
        metrics += meter.read({path: state[path][None] for path in setup.returned}, setup, functools.partial(tree.rows, group.state, [index]))
    return outcome, metrics


def run_stacked(setup: Setup, group: Group, batches: Batches) -> Trained:
    """Take a step of all clients at a time, in one vmapped call for those whose batches have one shape: nothing is padded or masked."""
    state = {path: _copy(group.state[path]) if path in setup.returned else group.state[path] for path in setup.own}
    for turn, parameters in zip(setup.slots, setup.trained, strict=True):
        for slot, paths in turn.items():
            for path, parameter in zip(paths, parameters, strict=True):
                state[path] = _copy(group.state[path]) if path in group.state else begin_slot(slot, state[parameter], rows=len(group.clients))
    losses = Losses(setup, group.clients)
    select = functools.cache(functools.partial(Selection, setup, state, losses, len(group.clients)))
    meter = Meter(group.clients)
    sources = {index: setup.draw_batches(batches, client, losses.seeds[index]) for index, client in enumerate(group.clients)}
    while sources:
        drawn = {index: batch for index, source in sources.items() if (batch := next(source, None)) is not None}
        sources = {index: sources[index] for index in drawn}
        for indices, batch in _bucket(drawn):
            select(indices).step(batch, meter)
    outcome = {path: state[path] for path in setup.returned}
    return outcome, meter.read(outcome, setup, lambda: group.state)


@dataclass(frozen=True)
class BoundTurn:
    """One Turn on the tensors that its steps read and write, of one client or of K' stacked ones.

    Stacked clients have leaves (K', ...). `parameters` and slots then hold the K' rows of each leaf one after the other, or the leaf itself if `stacked`.
    """

    turn: Turn
    own: Tree                                                      # dotted name -> what the loss reads
    leaves: tuple[Tensor, ...]                                     # what is differentiated
    parameters: list[Tensor]                                       # what is updated
    slots: Slots
    rows: int = 0                                                  # K'; 0: one client, without vmap
    stacked: bool = False

    def update(self, loss: Tensor, scalars: Tree) -> Tree:
        """Update the parameters in place; gives the loss and the scalars, () or (K',). Raises: LayoutError for a loss that trains nothing."""
        if not loss.requires_grad:
            raise LayoutError(f"does not depend on any parameter that its Turn trains, of {', '.join(self.turn.trains)}: "
                              "it was detached, or computed without gradients")
        found = torch.autograd.grad(loss, self.leaves, torch.ones_like(loss) if self.rows else None, allow_unused=True)
        used = [index for index, gradient in enumerate(found) if gradient is not None]
        parameters, slots = (self.parameters, self.slots) if len(used) == len(found) else self.select_used(used)
        gradients = [found[index] for index in used]
        if self.turn.optimizer.clip and gradients:
            gradients = (vmap(clip_gradients, (0, None)) if self.rows else clip_gradients)(gradients, self.turn.optimizer.clip)
        if self.rows and not self.stacked:
            gradients = [row for gradient in gradients for row in gradient.unbind()]
        self.turn.optimizer.update_out(parameters, gradients, slots)
        return {"loss": loss, **scalars}

    def select_used(self, used: list[int]) -> tuple[list[Tensor], Slots]:
        """Parameters and slots of the leaves that the loss read: an update passes over the others, as in torch.optim."""
        rows = 1 if self.stacked else self.rows or 1
        flat = [leaf * rows + row for leaf in used for row in range(rows)]
        return [self.parameters[index] for index in flat], {name: [slot[index] for index in flat] for name, slot in self.slots.items()}


class Losses:
    """The losses of stacked clients: in one vmapped call, or client by client where vmap cannot give them.

    A loss that draws from a global generator must draw the same for a client in whatever Group, but vmap has one generator for all clients. What vmap refuses,
    as control flow by values, is also computed client by client. Both come to light at a step, and hold for the rest of this training.
    """

    def __init__(self, setup: Setup, clients: Sequence[int]) -> None:
        self.setup, self.clients, self.one_by_one = setup, clients, False
        self.seeds = [setup.streams(client).seeds() for client in clients]
        self.buffers = [setup.own[path] for path in setup.buffers]
        self.laid_out = {setup.own[path] for path in setup.channels_last}

    def __call__(self, bound: BoundTurn, batch: Tree, indices: Sequence[int]) -> tuple[Tensor, Tree]:
        """The losses (K',) of the clients at `indices`, and their scalars."""
        seeds = [next(self.seeds[index]) for index in indices]
        clients = [self.clients[index] for index in indices]
        return (None if self.one_by_one else self.compute_stacked(bound, batch, clients, seeds[0])) or self.compute_one_by_one(bound, batch, clients, seeds)

    def compute_stacked(self, bound: BoundTurn, batch: Tree, clients: Sequence[int], seed: int) -> tuple[Tensor, Tree] | None:
        """All at once; None, and the buffers as they were, where vmap cannot give them."""
        setup, buffers = self.setup, [bound.own[name] for name in self.buffers]
        before = _copy_all(buffers)
        has_drawn = sow_and_watch(seed)
        try:
            with setup.naming(bound.turn, clients):
                result = setup.forward_stacked(setup.modules, bound.turn.loss, bound.own, setup.shared, batch, setup.context)
            self.one_by_one = has_drawn()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refusal:                            # if it was not vmap that refused, a client alone raises the same again
            self.one_by_one = True
            log.info("%s: vmap does not take the loss %s, its clients go one by one: %s", setup.where, bound.turn.loss_name, str(refusal).partition("\n")[0])
        if not self.one_by_one:
            return result
        for buffer, copy in zip(buffers, before, strict=True):
            buffer.copy_(copy)
        return None

    def compute_one_by_one(self, bound: BoundTurn, batch: Tree, clients: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, Tree]:
        """Each alone, in the memory layout of the sequential engine: random numbers fill a tensor in the order of its memory."""
        setup, found = self.setup, []
        split = {name: leaf.unbind() if leaf.requires_grad else leaf for name, leaf in bound.own.items()}      # one backward step for all rows
        for row, (client, seed) in enumerate(zip(clients, seeds, strict=True)):
            own = {name: _to_channels_last(rows[row]) if name in self.laid_out else rows[row] for name, rows in split.items()}
            images = tree.transform(tree.row(batch, row), _to_channels_last) if setup.images_last else tree.row(batch, row)
            with setup.naming(bound.turn, [client]):
                sow(seed)
                found.append(setup.forward_one(setup.modules, bound.turn.loss, own, setup.shared, images, setup.context))
        losses, scalars = zip(*found, strict=True)
        with setup.naming(bound.turn, clients):
            if len({frozenset(each) for each in scalars}) > 1:
                raise LayoutError(f"measured different things: {', '.join(sorted(set().union(*scalars)))}; wanted the same names for all clients")
        return torch.stack(losses), tree.stack(scalars)


class Selection:
    """Some rows of the stacked state, which take their steps together."""

    def __init__(self, setup: Setup, state: Tree, losses: Losses, clients: int, indices: tuple[int, ...]) -> None:
        self.setup, self.state, self.losses, self.indices = setup, state, losses, indices
        self.index = None if len(indices) == clients else torch.tensor(indices, device=next(iter(state.values())).device)
        self.stacked = [self.index is None and turn.optimizer.elementwise for turn in setup.turns]

        def leaves(paths: Iterable[str], stacked: bool) -> list[Tensor]:
            return [state[path] for path in paths] if stacked else [state[path][index] for path in paths for index in indices]
        self.targets = [(leaves(paths, stacked), {slot: leaves(names, stacked) for slot, names in slots.items()})
                        for paths, slots, stacked in zip(setup.trained, setup.slots, self.stacked, strict=True)]
        self.whole = [self.bind(number, state) for number in range(len(setup.turns))] if self.index is None else None

    def bind(self, number: int, read: Tree) -> BoundTurn:
        """One Turn that reads the leaves of `read` (K', ...) and updates the state itself."""
        return BoundTurn(self.setup.turns[number], *self.setup.bind(number, read), *self.targets[number], len(self.indices), self.stacked[number])

    def step(self, batch: Tree, meter: Meter) -> None:
        """Take all Turns on one stacked batch. Rows that are not all are copied out, and what modules wrote into their buffers is written back."""
        for number in range(len(self.setup.turns)):
            read = {} if self.index is None else {path: self.state[path][self.index] for path in self.setup.own}
            bound = self.whole[number] if self.whole else self.bind(number, read)
            losses = self.losses(bound, batch, self.indices)
            with self.setup.naming(bound.turn, [self.losses.clients[index] for index in self.indices]):
                meter.add(bound.update(*losses), self.indices, self.index)
            if self.index is not None:
                for path in self.setup.buffers:
                    self.state[path].index_copy_(0, self.index, read[path])


def forward_one(modules: Modules, loss: Loss, own: Tree, shared: Tree, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """Loss () and scalars of one client."""
    return functional_call(modules, {**own, **shared}, (loss, batch, context), tie_weights=False)


def forward_stacked(modules: Modules, loss: Loss, own: Tree, shared: Tree, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """Losses (K',) and scalars of clients stacked in `own` and `batch`; their gradients do not mix, so one backward pass gives them all.

    A loss may draw random numbers here, but nobody could say for which client: see Losses.
    """
    return vmap(functools.partial(forward_one, modules, loss), in_dims=(0, None, 0, None), randomness="different")(own, shared, batch, context)


def _bucket(drawn: dict[int, Tree]) -> Iterator[tuple[tuple[int, ...], Tree]]:
    """(rows of the clients whose batches have one layout, their batches stacked (K', ...)), for each layout."""
    buckets: dict[tree.Layout, list[int]] = {}
    for index, batch in drawn.items():
        buckets.setdefault(tree.layout(batch), []).append(index)
    for indices in buckets.values():
        yield tuple(indices), tree.stack([drawn[index] for index in indices])


def _copy(stacked: Tensor) -> Tensor:
    return stacked.clone(memory_format=torch.contiguous_format)    # the fused kernels read the rows as flat memory


def _copy_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each, in one launch of a kernel for all of a type: there are many and small ones."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    for dtype in {tensor.dtype for tensor in tensors}:
        torch._foreach_copy_([copy for copy in copies if copy.dtype == dtype], [tensor for tensor in tensors if tensor.dtype == dtype])
    return copies


def _allocate_row(stacked: Tensor, channels_last: bool) -> Tensor:
    row = torch.empty(stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
    return _to_channels_last(row) if channels_last else row


def _to_channels_last(leaf: Tensor) -> Tensor:
    return leaf.to(memory_format=torch.channels_last) if leaf.dim() == 4 else leaf     # not `contiguous`, which leaves what has one channel as it is
