"""Sites: what a method may see at a client and at the server, and nothing else."""
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpcfl.contract.problem import Problem
from hpcfl.data.augment import Augmentation
from hpcfl.data.shards import PLAIN, Shard, iterate_epochs
from hpcfl.errors import JobError
from hpcfl.streams import Stream
from hpcfl.training.evaluate import extract_features
from hpcfl.training.group import Group
from hpcfl.training.losses import cross_entropy
from hpcfl.training.turns import Loss, Turn
from hpcfl.tree import Tree


@dataclass(frozen=True)
class Holdings:
    """What a method may use of one client's data: images to train on and images to select by. Those of its personal test are not here."""

    train: Shard
    validation: Shard


@dataclass(frozen=True)
class ClientSite:
    """What client code may see: the problem, the images of the group's own clients, and nothing of anybody else.

    `remembered`, `shared` and `trainings` are what this rank remembers between calls; code of methods reaches the first two by `once` and `once_for_all`.
    """

    problem: Problem
    holdings: Mapping[int, Holdings]
    modules: Mapping[str, nn.Module]                               # structure only; the parameters are the group's state
    phase: str
    round: int
    remembered: Mapping[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))     # client -> name -> what `once` made
    shared: dict[str, tuple[tuple[Any, ...], Any]] = field(default_factory=dict)         # name -> what `once_for_all` made, and of what
    trainings: Counter[int] = field(default_factory=Counter)       # client -> how often it was trained in this round, by whatever step

    def once(self, name: str, client: int, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives of a client's data, computed once in a run for all steps that ask for the name: for what no round changes.

        It stays in the memory of the client's rank, is in no checkpoint, and is made again after a resume.
        """
        if name not in self.remembered[client]:
            self.remembered[client][name] = make()
        return self.remembered[client][name]

    def once_for_all(self, name: str, source: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives of `source`, computed once for all clients of this rank: for what follows from a message or a round and from nobody's data.

        It is made again when something of `source` is another: a Tensor another object, all else unequal. It stays in this rank's memory, as by `once`.
        """
        if name not in self.shared or not _is_same(self.shared[name][0], source):
            self.shared[name] = source, make()
        return self.shared[name][1]

    def stream(self, purpose: str, client: int) -> Stream:
        """The random stream of one purpose, client and this round."""
        return self.problem.stream(f"{self.phase}/{purpose}", client, self.round)

    def sizes(self, group: Group) -> Tensor:
        """Number of training images of each client of the group, (K,) float64."""
        return torch.tensor([len(self.holdings[client].train) for client in group.clients], dtype=torch.float64)

    def epochs(self, client: int, count: int, batch: int, augmentation: Augmentation = PLAIN) -> Iterable[Tree]:
        """Shuffled batches {"x": (B, C, H, W), "y": (B,)} of a client's training part, `count` times over; as they are unless augmented."""
        return iterate_epochs(self.holdings[client].train, batch, count, self.stream("batches", client), augmentation)

    def features(self, group: Group, client: int) -> Tensor:
        """z = g_k(x) of a client's training images, (n, p), in eval mode and without gradients. Raises: NonFiniteError naming the client."""
        where = f"phase {self.phase}, round {self.round}"
        return extract_features(group, self.modules, client, self.holdings[client].train, where, self.problem.optimizer().advice)

    def fit(self, group: Group, turns: Sequence[Turn], batches: Callable[[int], Iterable[Tree]], *, context: Tree | None = None,
            frozen_norm: bool = False, keep_optimizer: bool = False, steps: int = 0, channels_last: bool | None = None) -> tuple[Group, dict[str, Tensor]]:
        """Train the group as `Problem.fit`."""
        streams = {client: self.stream(f"training {self.trainings[client]}", client) for client in group.clients}
        self.trainings.update(group.clients)                       # so that no training repeats the draws of the one before
        return self.problem.fit(group, self.modules, turns, batches, context=context, frozen_norm=frozen_norm, keep_optimizer=keep_optimizer,
                                steps=steps, channels_last=channels_last, where=f"phase {self.phase}, round {self.round}", streams=streams.__getitem__)

    def train_model(self, group: Group, loss: Loss, context: Tree | None = None) -> tuple[Group, dict[str, Tensor]]:
        """The local training of the [training] section: `epochs` passes of the model over the client's own images, augmented."""
        training, augmentation = self.problem.job.training, self.problem.augmentation(soft_labels=loss is cross_entropy)
        turn = Turn(("model",), loss, self.problem.optimizer())
        return self.fit(group, [turn], lambda client: self.epochs(client, training.epochs, training.batch, augmentation), context=context,
                        steps=self.steps(group))

    def steps(self, group: Group) -> int:
        """Steps that the local training of the [training] section takes in the whole run, those of the largest client of the group."""
        training = self.problem.job.training
        return -(-int(self.sizes(group).max()) // training.batch) * training.epochs * self.problem.job.federation.rounds


@dataclass(frozen=True)
class ServerSite:
    """What server code may see: the problem, the public part of the data, and a way to spread independent work over all ranks.

    `spread(verb, items, costs)` gives {key: Tree} for {key: Tree}: every rank calls the step's method of that name, `step.<verb>(its share, its own
    site)`, on a share of the items of about equal cost; results come back to the server in host memory. `note`
    records one number of the round under a name, `book_metrics` one number for each client: book_metrics((0, 2), {"dilation_accuracy": (2,)}).
    """

    problem: Problem
    public: Shard | None
    public_validation: Shard | None
    phase: str
    round: int
    row: int                                                       # the round, counted over all phases
    spread: Callable[..., dict[int, Tree]]
    note: Callable[[str, float], None]
    book_metrics: Callable[[Sequence[int], Mapping[str, Tensor]], None]

    def require_public(self) -> tuple[Shard, Shard]:
        """The public images to learn on, and those held out of them. Raises: JobError where the server has none."""
        if self.public is None or self.public_validation is None:
            raise JobError(f"{self.problem.job.algorithm_name} learns on images of the server, but data.public_fraction = 0 gives it none; wanted more than 0")
        return self.public, self.public_validation

    def stream(self, purpose: str, client: int = -1) -> Stream:
        """The server's random stream of one purpose in this round; `client`: whose model it works on."""
        return self.problem.stream(f"server/{self.phase}/{purpose}", client, self.round)

    def fit(self, group: Group, modules: Mapping[str, nn.Module], turns: Sequence[Turn], batches: Callable[[int], Iterable[Tree]], *,
            context: Tree | None = None, frozen_norm: bool = False, keep_optimizer: bool = False, steps: int = 0,
            work: str = "training", member: str = "model") -> tuple[Group, dict[str, Tensor]]:
        """Train models at the server as `Problem.fit`; the rows of the group are models here, numbered by whoever makes it.

        In errors `work` says what they are trained for and `member` what a row is. What draws from a global generator draws the same where a row is trained
        twice in a round for the same work.
        """
        return self.problem.fit(group, modules, turns, batches, context=context, frozen_norm=frozen_norm, keep_optimizer=keep_optimizer,
                                steps=steps, where=f"server, phase {self.phase}, round {self.round}, {work}", member=member,
                                streams=partial(self.stream, f"training/{work}"))


def _is_same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    return len(before) == len(now) and all(new is old or (not isinstance(new, Tensor) and new == old) for old, new in zip(before, now, strict=True))
