"""Sizes: which architecture each client has in each round, from size classes or from memory budgets."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from hpcfl.errors import JobError
from hpcfl.models import zoo
from hpcfl.settings.sections import Models
from hpcfl.streams import Stream

CLASSES = 32                                                       # size classes that a memory budget is tried against: 0.75^32 is 0.0001


@dataclass(frozen=True)
class Sizes:
    """Client k trains models.names[m(k)] with every hidden width times shrinkage^e, e its size class (FedConv, arXiv 2502.20639, section 2 of its code).

    m(k) is that of models.assignment. The class comes from models.sizes[k mod m], or is the largest that fits the client's budget
    models.memory_mb[k mod m]; `memory(architecture)`: bytes that training it takes. By models.size_schedule entries stay, rotate by one client
    each round, or are drawn anew for every client and round.
    Raises: JobError for "blocks" with fewer clients than names.
    """

    models: Models
    clients: int
    seed: int
    memory: Callable[[str], int]

    def __post_init__(self) -> None:
        names = len(self.models.names)
        if self.models.assignment == "blocks" and self.clients < names:
            raise JobError(f"models.assignment = 'blocks' gives each of the M = {names} models.names a block of clients, but there are K = {self.clients} "
                           f"clients; wanted K >= M: set federation.clients to at least {names}, name fewer models, or set models.assignment = 'cyclic'")

    def architecture(self, client: int, row: int) -> str:
        """The name in the zoo of what a client trains in a round; rows count over all phases."""
        return self._architecture(self._name(client), self._entry(client, row))

    @cached_property
    def every(self) -> tuple[str, ...]:
        """All architectures that any client may have in any round, by name."""
        moving = self.models.size_schedule != "fixed"
        return tuple(sorted({self._architecture(self._name(client), entry) for client in range(self.clients)
                             for entry in (range(self._entries) if moving else [self._entry(client, 0)])}))

    @property
    def _entries(self) -> int:
        return len(self.models.memory_mb or self.models.sizes)

    def _name(self, client: int) -> int:
        return ASSIGNMENTS[self.models.assignment](client, self.clients, len(self.models.names))

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


ASSIGNMENTS: dict[str, Callable[[int, int, int], int]] = {         # (k, K, M) -> m(k); blocks: GeFL (arXiv 2412.18460), the last takes the rest
    "cyclic": lambda client, clients, names: client % names,
    "blocks": lambda client, clients, names: min(client // (clients // names), names - 1)}
SCHEDULES: dict[str, Callable[[Sizes, int, int], int]] = {"fixed": lambda sizes, client, row: client, "rotate": Sizes._rotated, "random": Sizes._drawn}
