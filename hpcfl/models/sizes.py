"""Sizes: which architecture each client has in each round, from size classes or from memory budgets."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from hpcfl.errors import JobError
from hpcfl.job import Models
from hpcfl.models import zoo
from hpcfl.streams import Stream

CLASSES = 32                                                       # size classes that a memory budget is tried against: 0.75^32 is 0.0001


@dataclass(frozen=True)
class Sizes:
    """Client k trains models.names[k mod m] with every hidden width times shrinkage^e, e its size class (FedConv, arXiv 2502.20639, section 2 of its code).

    The class comes from models.sizes[k mod m], or is the largest that fits the client's budget models.memory_mb[k mod m]; `memory(architecture)`: bytes that
    training it takes. By models.size_schedule entries stay, rotate by one client each round, or are drawn anew for every client and round.
    """

    models: Models
    clients: int
    seed: int
    memory: Callable[[str], int]

    def architecture(self, client: int, row: int) -> str:
        """The name in the zoo of what a client trains in a round; rows count over all phases."""
        return self._architecture(client % len(self.models.names), self._entry(client, row))

    @cached_property
    def every(self) -> tuple[str, ...]:
        """All architectures that any client may have in any round, by name."""
        moving = self.models.size_schedule != "fixed"
        return tuple(sorted({self._architecture(client % len(self.models.names), entry) for client in range(self.clients)
                             for entry in (range(self._entries) if moving else [self._entry(client, 0)])}))

    @property
    def _entries(self) -> int:
        return len(self.models.memory_mb or self.models.sizes)

    def _entry(self, client: int, row: int) -> int:
        return SCHEDULES[self.models.size_schedule](self, client, row) % self._entries

    def _architecture(self, name: int, entry: int) -> str:
        base = self.models.names[name]
        if self.models.memory_mb:
            return self._fitting(base, self.models.memory_mb[entry])
        return self._sized(base, self.models.sizes[entry])

    def _fitting(self, base: str, budget_mb: float) -> str:
        """The largest size of a model whose training fits. Raises: JobError where none does."""
        said = f"{base} needs {self.memory(base) / 1e6:.2f} MB"    # raises what is wrong with the model itself
        for size in range(CLASSES):
            name = self._sized(base, size)
            try:
                needed = self.memory(name) / 1e6
            except JobError:                                       # no channel is left: the size before was the smallest
                break
            if needed <= budget_mb:
                return name
            said = f"{name} needs {needed:.2f} MB"
        raise JobError(f"models.memory_mb: no size of '{base}' trains in {budget_mb:g} MB, even {said}; raise the budget, lower training.batch "
                       "or models.shrinkage, or choose another model")

    def _sized(self, base: str, size: int) -> str:
        name, width = zoo.split_name(base)
        width *= self.models.shrinkage ** size
        return name if width == 1 else f"{name}@{width:.10g}"

    def _rotated(self, client: int, row: int) -> int:
        return client + row

    def _drawn(self, client: int, row: int) -> int:
        return int(Stream(self.seed, "size", client, row).numpy().integers(self._entries))


SCHEDULES: dict[str, Callable[[Sizes, int, int], int]] = {"fixed": lambda sizes, client, row: client, "rotate": Sizes._rotated, "random": Sizes._drawn}
