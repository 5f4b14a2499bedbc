"""Residency: where the states of clients lie while they are not at work: on the device, in host memory, or in a file."""
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hpcfl import tree
from hpcfl.files.scratch import Scratch, Written
from hpcfl.training.group import Group
from hpcfl.tree import Tree


@dataclass(frozen=True)
class Parked:
    """A Group that was put away: a value, as a Group is; `fetch` gives it back on the device, in memory of its own."""

    architecture: str
    clients: tuple[int, ...]
    leaves: Mapping[str, Any]                                      # path -> what stands for the leaf
    bring: Callable[[Mapping[str, Any]], Tree]

    def fetch(self) -> Group:
        """The Group, which the caller lets go after the work."""
        return Group(self.architecture, self.clients, self.bring(self.leaves))

    def part(self, name: str) -> Mapping[str, Any]:
        """What stands for the leaves below `name/`; the same objects as long as these leaves are the same."""
        return tree.part(self.leaves, name)


class Device:
    """Groups stay where work is done."""

    def __init__(self, device: torch.device, folder: str):
        """As the other residencies; it needs neither."""

    def park(self, group: Group) -> Group:
        """The Group itself."""
        return group


class Elsewhere(ABC):
    """Groups are put away leaf by leaf; a leaf that comes back as it was fetched is not put away again."""

    def __init__(self, device: torch.device, folder: str):
        self.device = device
        self.fetched = WeakTensorKeyDictionary()                   # leaf -> what stands for it

    def park(self, group: Group) -> Parked:
        """The Group, put away."""
        leaves = {path: self.fetched[leaf] if leaf in self.fetched else self.put(leaf) for path, leaf in group.state.items()}
        return Parked(group.architecture, group.clients, leaves, self.bring)

    def bring(self, leaves: Mapping[str, Any]) -> Tree:
        """The leaves on the device."""
        state = {path: self.get(there) for path, there in leaves.items()}
        self.fetched.update(zip(state.values(), leaves.values(), strict=True))
        return state

    @abstractmethod
    def put(self, leaf: Tensor) -> Any:
        """What stands for a leaf from now on."""

    @abstractmethod
    def get(self, there: Any) -> Tensor:
        """A leaf on the device."""


class Host(Elsewhere):
    """Groups lie in host memory; on a CPU too they are copied, so that work costs the same there. Pageable: pinned memory is taken in powers of two."""

    def put(self, leaf: Tensor) -> Tensor:
        return leaf.detach().to("cpu", copy=True)

    def get(self, there: Tensor) -> Tensor:
        return there.to(self.device, copy=True)


class Disk(Elsewhere):
    """Groups lie in a file of this rank. Raises EnvironmentFault as Scratch does."""

    def __init__(self, device: torch.device, folder: str):
        super().__init__(device, folder)
        self.scratch = Scratch(folder)

    def put(self, leaf: Tensor) -> Written:
        return self.scratch.write(leaf)

    def get(self, there: Written) -> Tensor:
        return self.scratch.read(there).to(self.device)


RESIDENCIES: dict[str, Callable[[torch.device, str], Device | Elsewhere]] = {"device": Device, "host": Host, "disk": Disk}
