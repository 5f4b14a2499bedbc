"""Group: the clients of one rank that share an architecture, their states as one Tree with a leading client axis."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from hpcfl import tree
from hpcfl.errors import LayoutError
from hpcfl.tree import Tree

OPTIMIZER = "optimizer"                                            # paths below it hold persistent optimiser state; no module may carry the name


@dataclass(frozen=True)
class Group:
    """K clients of one architecture: state["model/head.weight"] is (K, ...), row i belongs to clients[i].

    Paths are "module/parameter.name", and "optimizer/module/slot/parameter.name" for persistent optimiser state. Groups are values: methods
    return new Groups, which may share leaves with the old one.
    Raises: LayoutError where a leaf does not have one row per client, a client appears twice or there is none.
    """

    architecture: str
    clients: tuple[int, ...]
    state: Tree

    def __post_init__(self) -> None:
        if not self.clients or len(set(self.clients)) != len(self.clients):
            raise LayoutError(f"group {self.architecture}: clients are {self.clients}, wanted at least one and each once")
        for path, leaf in self.state.items():
            if leaf.dim() == 0 or len(leaf) != len(self.clients):
                raise LayoutError(f"group {self.architecture}: '{path}' is {tuple(leaf.shape)}, wanted {len(self.clients)} rows, one per client")

    @staticmethod
    def from_states(architecture: str, states: Mapping[int, Tree]) -> Group:
        """A Group from one Tree per client, in ascending client order; optimiser state that only some clients have begins at zero for the others.

        Raises: LayoutError naming the client, path and both shapes where a Tree is laid out unlike that of the first client.
        """
        clients = tuple(sorted(states))
        slots = {path: leaf for client in clients for path, leaf in states[client].items() if path.startswith(f"{OPTIMIZER}/")}
        states = {client: state | {path: torch.zeros_like(slots[path]) for path in slots if path not in state} for client, state in states.items()}
        for client in clients[1:]:
            _check_same_layout(architecture, clients[0], states[clients[0]], client, states[client])
        return Group(architecture, clients, tree.stack([states[client] for client in clients]) if clients else {})

    @property
    def device(self) -> torch.device:
        """Where the state lies."""
        return next((leaf.device for leaf in self.state.values()), torch.device("cpu"))

    @cached_property
    def row_of(self) -> Mapping[int, int]:
        """Client -> its row."""
        return {client: row for row, client in enumerate(self.clients)}

    def to(self, device: torch.device | str) -> Group:
        """The Group on a device."""
        return replace(self, state=tree.to(self.state, device))

    def fetch(self) -> Group:
        """The Group itself, which lies where work is done; a parked one (hpcfl.federation.residency) is brought there by its `fetch`."""
        return self

    def states(self) -> dict[int, Tree]:
        """{client: its Tree}, as views of the stacked state."""
        return {client: tree.row(self.state, index) for index, client in enumerate(self.clients)}

    def part(self, name: str) -> Tree:
        """The stacked Tree below `name/`: `part("model")["head.weight"]` is (K, ...)."""
        return tree.part(self.state, name)

    def without(self, name: str) -> Group:
        """The Group with nothing below `name/`."""
        return replace(self, state={path: leaf for path, leaf in self.state.items() if not path.startswith(f"{name}/")})

    def with_part(self, name: str, stacked: Tree) -> Group:
        """The Group whose part `name` is this stacked Tree (K, ...) and nothing else; `group.with_part("model", {...})`."""
        return replace(self, state={**self.without(name).state, **tree.join(**{name: stacked})})

    def with_common_part(self, name: str, one: Tree) -> Group:
        """The Group whose clients all start from one Tree in part `name`, each with memory of its own."""
        return self.with_part(name, tree.repeat(one, len(self.clients)))

    def select(self, clients: Iterable[int]) -> Group:
        """The Group of some of the clients, in this Group's order; their rows are copied, unless all are wanted.

        Raises: LayoutError where a client is not in the Group.
        """
        wanted = set(clients)
        if missing := wanted - set(self.clients):
            raise LayoutError(f"group {self.architecture}: has no clients {sorted(missing)}; it has {self.clients}")
        if wanted == set(self.clients):
            return self
        indices = [index for index, client in enumerate(self.clients) if client in wanted]
        return Group(self.architecture, tuple(self.clients[index] for index in indices), tree.rows(self.state, indices))

    def with_rows(self, other: Group) -> Group:
        """This Group with the rows of `other`, a Group of some of its clients, written in; nothing else changes.

        Optimiser state that only one of the two Groups has is zero for the clients that have none, which is where it begins anyway.
        Raises: LayoutError where `other` has another architecture, foreign clients, or lacks or adds a path outside the optimiser state.
        """
        if other.architecture != self.architecture or not set(other.clients) <= set(self.clients):
            raise LayoutError(f"group {self.architecture} {self.clients}: cannot take rows of group {other.architecture} {other.clients}")
        for path in self.state.keys() ^ other.state.keys():
            if not path.startswith(f"{OPTIMIZER}/"):
                raise LayoutError(f"group {self.architecture}: '{path}' is in only one of the Groups of clients {self.clients} and {other.clients}")
        if other.clients == self.clients:
            return other
        rows = torch.tensor([self.row_of[client] for client in other.clients])
        state = dict(self.state)
        for path, leaf in other.state.items():
            old = state[path].to(leaf.device) if path in state else leaf.new_zeros(len(self.clients), *leaf.shape[1:])
            state[path] = old.index_copy(0, rows.to(leaf.device), leaf)
        for path in self.state.keys() - other.state.keys():
            state[path] = state[path].index_fill(0, rows.to(state[path].device), 0)
        return replace(self, state=state)


def _check_same_layout(architecture: str, first: int, one: Tree, client: int, other: Tree) -> None:
    for path in (*one, *(path for path in other if path not in one)):
        got, wanted = (tuple(side[path].shape) if path in side else "missing" for side in (other, one))
        if got != wanted:
            raise LayoutError(f"group {architecture}: '{path}' of client {client} is {got}, client {first} has {wanted}; "
                              f"clients of one model name must share shapes")
