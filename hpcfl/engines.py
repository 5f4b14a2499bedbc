"""The engines of fit: how the steps of a Plan are taken, client after client or all clients together."""
from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from hpcfl import tree
from hpcfl.errors import NonFiniteError
from hpcfl.group import Group
from hpcfl.optimizers import Slots, begin, clipped
from hpcfl.tree import Tree

if TYPE_CHECKING:
    from hpcfl.fit import Batches, Loss, Modules, Turn

log = logging.getLogger(__name__)

RECOMPILES = 256                                                   # torch's limit of 8 per function is below the architectures of a run
Forward = Callable[..., tuple[Tensor, Tree]]
Outcome = tuple[Tree, list[dict[str, float]]]                      # what training changed (K, ...), and each client's mean metrics


@dataclass(frozen=True)
class Plan:
    """What fit has found out before the first step."""

    modules: Modules
    turns: tuple[Turn, ...]
    own: dict[str, str]                                            # every client's own tensors: state path -> dotted name below Modules
    trained: tuple[tuple[str, ...], ...]                           # per Turn, the state paths it updates
    slots: tuple[dict[str, list[str]], ...]                        # per Turn, slot -> one path per updated parameter
    buffers: tuple[str, ...]                                       # state paths that modules in train mode write by themselves
    returned: tuple[str, ...]                                      # state paths that change and go back to the caller
    shared: Tree                                                   # dotted name -> tensor of the modules that the state does not hold
    forward: Forward
    context: Tree
    channels_last: frozenset[str]                                  # state paths of the convolutions that the sequential engine lays out so
    images_last: bool                                              # whether it lays out images so
    where: str
    member: str                                                    # what a row of the Group is, in errors

    def bind(self, number: int, state: Tree) -> tuple[Tree, tuple[Tensor, ...]]:
        """What the loss of one Turn reads, {dotted name: tensor of `state`}, and those of its tensors that are differentiated."""
        leaves = {path: state[path].detach().requires_grad_() for path in self.trained[number]}
        return {name: leaves.get(path, state[path]) for path, name in self.own.items()}, tuple(leaves.values())


def sequential(plan: Plan, group: Group, batches: Batches) -> Outcome:
    """Client after client in one memory, aligned as any tensor is, so that the bits do not depend on the row a client has in its Group."""
    state = {path: _own_memory(group.state[path], path in plan.channels_last) for path in plan.own}
    bounds = []
    for number, turn in enumerate(plan.turns):
        parameters = [state[path] for path in plan.trained[number]]
        slots = {slot: [begin(slot, parameter) for parameter in parameters] for slot in turn.optimizer.slots}
        bounds.append(Bound(turn, *plan.bind(number, state), parameters, slots))
    for bound, paths in zip(bounds, plan.slots, strict=True):
        state |= {path: tensor for slot in paths for path, tensor in zip(paths[slot], bound.slots[slot], strict=True)}
    outcome = {path: state[path].new_empty(len(group.clients), *state[path].shape) for path in plan.returned}
    metrics = []
    for index, client in enumerate(group.clients):
        for path, row in state.items():
            row.copy_(group.state[path][index]) if path in group.state else row.zero_()
        meter = Meter([client], plan.member)
        for batch in batches(client):
            batch = tree.transform(batch, _channels_last) if plan.images_last else batch
            for bound in bounds:
                meter.add(bound.step(plan, batch), (0,))
        for path, rows in outcome.items():
            rows[index].copy_(state[path])
        metrics += meter.read({path: state[path][None] for path in plan.returned}, plan.where)
    return outcome, metrics


def together(plan: Plan, group: Group, batches: Batches) -> Outcome:
    """All clients a step further at a time, by one vmapped call for those whose batches have one shape: nothing is padded or masked."""
    state = {path: _copy(group.state[path]) if path in plan.returned else group.state[path] for path in plan.own}
    for turn, parameters in zip(plan.slots, plan.trained, strict=True):
        for slot, paths in turn.items():
            for path, parameter in zip(paths, parameters, strict=True):
                state[path] = _copy(group.state[path]) if path in group.state else begin(slot, state[parameter], rows=len(group.clients))
    select = functools.cache(functools.partial(Selection, plan, state, len(group.clients)))
    meter = Meter(group.clients, plan.member)
    sources = {index: iter(batches(client)) for index, client in enumerate(group.clients)}
    while sources:
        drawn = {index: batch for index, source in sources.items() if (batch := next(source, None)) is not None}
        sources = {index: sources[index] for index in drawn}
        for indices, batch in _buckets(drawn):
            select(indices).step(batch, meter)
    outcome = {path: state[path] for path in plan.returned}
    return outcome, meter.read(outcome, plan.where)


@dataclass(frozen=True)
class Bound:
    """One Turn on concrete tensors. Vmapped, a leaf is (K', ...), and `parameters` and slots have its K' rows in its place, or itself if `stacked`."""

    turn: Turn
    own: Tree                                                      # dotted name -> what the loss reads
    leaves: tuple[Tensor, ...]                                     # what is differentiated
    parameters: list[Tensor]                                       # what is updated
    slots: Slots
    rows: int = 0                                                  # K'; 0: one client, not vmapped
    stacked: bool = False

    def step(self, plan: Plan, batch: Tree) -> Tree:
        """One update in place; the loss and the scalars, () or (K',)."""
        loss, scalars = plan.forward(plan.modules, self.turn.loss, self.own, plan.shared, batch, plan.context)
        gradients = torch.autograd.grad(loss, self.leaves, torch.ones_like(loss) if self.rows else None, allow_unused=True)
        used = [index for index, gradient in enumerate(gradients) if gradient is not None]
        parameters, slots = (self.parameters, self.slots) if len(used) == len(gradients) else self.part(used)
        gradients = [gradients[index] for index in used]
        if self.turn.optimizer.clip and gradients:
            gradients = (vmap(clipped, (0, None)) if self.rows else clipped)(gradients, self.turn.optimizer.clip)
        if self.rows and not self.stacked:
            gradients = [row for gradient in gradients for row in gradient.unbind()]
        self.turn.optimizer.update_out(parameters, gradients, slots)
        return {"loss": loss, **scalars}

    def part(self, used: list[int]) -> tuple[list[Tensor], Slots]:
        """Parameters and slots of some leaves: an update passes over what the loss left out, as in torch.optim."""
        rows = 1 if self.stacked else self.rows or 1
        flat = [leaf * rows + row for leaf in used for row in range(rows)]
        return [self.parameters[index] for index in flat], {name: [slot[index] for index in flat] for name, slot in self.slots.items()}


class Selection:
    """Some rows of the stacked state, which take steps together."""

    def __init__(self, plan: Plan, state: Tree, clients: int, indices: tuple[int, ...]) -> None:
        self.plan, self.state, self.indices = plan, state, indices
        self.index = None if len(indices) == clients else torch.tensor(indices, device=next(iter(state.values())).device)
        self.stacked = [self.index is None and turn.optimizer.elementwise for turn in plan.turns]

        def leaves(paths: Iterable[str], stacked: bool) -> list[Tensor]:
            return [state[path] for path in paths] if stacked else [state[path][index] for path in paths for index in indices]
        self.targets = [(leaves(paths, stacked), {slot: leaves(names, stacked) for slot, names in slots.items()})
                        for paths, slots, stacked in zip(plan.trained, plan.slots, self.stacked, strict=True)]
        self.whole = [self.bind(number, state) for number in range(len(plan.turns))] if self.index is None else None

    def bind(self, number: int, read: Tree) -> Bound:
        """One Turn that reads `read` (K', ...) and updates the state itself."""
        return Bound(self.plan.turns[number], *self.plan.bind(number, read), *self.targets[number], len(self.indices), self.stacked[number])

    def step(self, batch: Tree, meter: Meter) -> None:
        """All Turns on one stacked batch; a part of the clients is gathered, and what its modules wrote into their buffers is put back."""
        for number in range(len(self.plan.turns)):
            if self.whole:
                meter.add(self.whole[number].step(self.plan, batch), self.indices)
                continue
            read = {path: self.state[path][self.index] for path in self.plan.own}
            meter.add(self.bind(number, read).step(self.plan, batch), self.indices, self.index)
            for path in self.plan.buffers:
                self.state[path].index_copy_(0, self.index, read[path])


class Meter:
    """Sums of what the losses of K clients measured, on the device until the end, so that no step waits for them."""

    def __init__(self, clients: Sequence[int], member: str = "client") -> None:
        self.clients, self.member = clients, member
        self.totals: Tree = {}                                     # name -> (K,) float64
        self.counts: dict[str, list[int]] = {}                     # name -> K numbers of values

    def add(self, values: Tree, rows: Sequence[int], index: Tensor | None = None) -> None:
        """Add values, () for a single client or (K',), to the clients at `rows`; `index` is these as a tensor, None for all clients."""
        for name, value in values.items():
            if name not in self.totals:
                self.totals[name] = torch.zeros(len(self.clients), dtype=torch.float64, device=value.device)
                self.counts[name] = [0] * len(self.clients)
            if index is None:
                self.totals[name].add_(value.detach())
            else:
                self.totals[name].index_add_(0, index, value.detach().double())
            for row in rows:
                self.counts[name][row] += 1

    def read(self, changed: Tree, where: str) -> list[dict[str, float]]:
        """Each client's means. Raises NonFiniteError naming the clients with NaN or infinity in these or in `changed` (K, ...)."""
        leaves = [leaf.reshape(len(self.clients), -1) for leaf in tree.floating(changed).values()]
        sums = torch.stack([leaf.sum(1, dtype=torch.promote_types(leaf.dtype, torch.float32)).double() for leaf in leaves])       # finite if all are
        table = torch.stack([*self.totals.values(), sums.sum(0)], dim=1).tolist()    # (K, names + 1): the one synchronisation
        if broken := [str(client) for client, row in zip(self.clients, table, strict=True) if not all(map(math.isfinite, row))]:
            raise NonFiniteError(f"{where}: training of {self.member} {', '.join(broken)} reached NaN or infinity in its loss or weights; "
                                 f"lower the learning rate or bound the gradient norm (training.clip)")
        return [{name: total / counts[row] for (name, counts), total in zip(self.counts.items(), totals) if counts[row]}
                for row, totals in enumerate(table)]


def forward_one(modules: Modules, loss: Loss, own: Tree, shared: Tree, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """Loss () and scalars of one client."""
    return functional_call(modules, {**own, **shared}, (loss, batch, context), tie_weights=False)


def forward_together(modules: Modules, loss: Loss, own: Tree, shared: Tree, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """Losses (K',) and scalars of clients stacked in `own` and `batch`; their gradients do not mix, so one backward pass gives them all."""
    return vmap(functools.partial(forward_one, modules, loss), in_dims=(0, None, 0, None))(own, shared, batch, context)


@functools.cache
def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module-level function compiled (its backward pass with it); where that proves impossible, one warning and the function as it is from then on."""
    from torch._dynamo import config                               # imported here: a second of start-up that eager runs do not need
    from torch._dynamo.exc import TorchDynamoException
    config.recompile_limit = max(config.recompile_limit, RECOMPILES)
    fast, obstacles = torch.compile(forward), []

    def either(*arguments: object) -> Any:
        if not obstacles:
            try:
                return fast(*arguments)
            except TorchDynamoException as obstacle:
                obstacles.append(obstacle)
                log.warning("torch.compile does not work here, this run goes on uncompiled: %s", str(obstacle).strip().partition("\n")[0])
        return forward(*arguments)
    return either


def _buckets(drawn: dict[int, Tree]) -> Iterator[tuple[tuple[int, ...], Tree]]:
    """(rows of the clients whose batches have one layout, their batches stacked (K', ...))."""
    buckets: dict[tree.Layout, list[int]] = {}
    for index, batch in drawn.items():
        buckets.setdefault(tree.layout(batch), []).append(index)
    for indices in buckets.values():
        yield tuple(indices), tree.stack([drawn[index] for index in indices])


def _copy(stacked: Tensor) -> Tensor:
    return stacked.clone(memory_format=torch.contiguous_format)    # the fused kernels read the rows as flat memory


def _own_memory(stacked: Tensor, channels_last: bool) -> Tensor:
    row = torch.empty(stacked.shape[1:], dtype=stacked.dtype, device=stacked.device)
    return _channels_last(row) if channels_last else row


def _channels_last(leaf: Tensor) -> Tensor:
    return leaf.to(memory_format=torch.channels_last) if leaf.dim() == 4 else leaf     # not `contiguous`, which leaves what has one channel as it is
