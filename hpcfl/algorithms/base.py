"""What an algorithm is: a few verbs over Trees, what it may see at a client and at the server, and the plan that puts its steps in order."""
from abc import ABC
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from hpcfl import fit, tree
from hpcfl.comm import Total
from hpcfl.data.augment import OF_IMAGES, Augmentation
from hpcfl.data.shards import PLAIN, Scale, Shard, epochs
from hpcfl.errors import JobError
from hpcfl.group import Group
from hpcfl.job import Job
from hpcfl.losses import cross_entropy
from hpcfl.models import zoo
from hpcfl.models.sizes import Sizes
from hpcfl.optimizers import Optimizer
from hpcfl.statistics import Statistics, Uploads
from hpcfl.streams import Stream
from hpcfl.tree import Tree

Totals = Mapping[str, Total | Uploads]                             # what the server makes of all clients' Statistics


@dataclass(frozen=True)
class Problem:
    """What everybody knows about the experiment: the job, the images' shape and scale, the classes, who has which architecture."""

    job: Job
    shape: tuple[int, int, int]                                    # (C, H, W) as the models see it
    classes: int
    scale: Scale
    sizes: Sizes                                                   # who has which architecture
    device: torch.device

    @property
    def architectures(self) -> tuple[str, ...]:
        """Those of client 0 .. K-1 in the first round."""
        return tuple(self.architecture(client, 0) for client in range(self.sizes.clients))

    def architecture(self, client: int, row: int) -> str:
        """What a client trains in a round, rows counted over all phases."""
        return self.sizes.architecture(client, row)

    def model(self, architecture: str) -> nn.Module:
        """A newly initialised model of the zoo."""
        models = self.job.models
        return zoo.build(architecture, self.shape, self.classes, models.features, models.norm, models.feature_relu)

    def structure(self, architecture: str) -> nn.Module:
        """A model of the zoo on the device whose weights do not matter, to be filled with somebody's state."""
        with self.stream("structure").seeding():
            return self.model(architecture).to(self.device)

    def stream(self, purpose: str, client: int = -1, round_: int = -1) -> Stream:
        """The random stream of one purpose."""
        return Stream(self.job.run.seed, purpose, client, round_)

    def optimizer(self) -> Optimizer:
        """The local optimiser as the [training] section describes it."""
        return Optimizer.of(self.job.training)

    def augmentation(self, soft_labels: bool = False) -> Augmentation:
        """What the [training] section does to training images; `soft_labels`: whether the loss takes labels (B, classes) as well as (B,).

        Raises: JobError where images are mixed and the loss needs the class of each.
        """
        training = self.job.training
        augmentation = Augmentation(training.augment, self.classes, training.mix_alpha)
        if augmentation.mixes_labels and not soft_labels:
            raise JobError(f"training.augment = {list(training.augment)} mixes images of different classes, but {self.job.algorithm_name} trains with a loss "
                           f"of its own, for one class per image; wanted some of {', '.join(OF_IMAGES)}, or a method that trains by cross-entropy, as fedavg")
        return augmentation

    def fit(self, group: Group, modules: Mapping[str, nn.Module], turns: Sequence[fit.Turn], batches: Callable[[int], Iterable[Tree]], *,
            context: Tree | None = None, frozen_norm: bool = False, keep_optimizer: bool = False, steps: int = 0,
            channels_last: bool | None = None, where: str = "fit", member: str = "client") -> tuple[Group, dict[str, Tensor]]:
        """Train a group by the one training loop, with the engine, precision and compilation of the job; `steps`: of one model in the whole run."""
        training, run = self.job.training, self.job.run
        return fit.fit(group, modules, turns, batches, context=context, frozen_norm=frozen_norm, keep_optimizer=keep_optimizer,
                       engine="sequential" if run.deterministic else training.engine, compile=run.compile, precision=training.precision,
                       channels_last=channels_last, expected_steps=steps, where=where, member=member)

    def common_base(self) -> str:
        """The one model of the zoo of which every client trains some width.

        Raises: JobError where models.names are of several models.
        """
        bases = sorted({zoo.split_name(name)[0] for name in self.job.models.names})
        if len(bases) > 1:
            raise JobError(f"models.names = {list(self.job.models.names)} are of {len(bases)} models, but {self.job.algorithm_name} makes one global model "
                           "for all widths; wanted one name, and size classes in models.sizes")
        return bases[0]

    def common_feature_size(self) -> int:
        """The one p of all clients' features.

        Raises: JobError where models.features = 0 leaves every model its own.
        """
        if self.job.models.features == 0:
            raise JobError(f"models.features = 0 lets every model keep its own feature size, but {self.job.algorithm_name} exchanges features; "
                           "wanted one common size, for example models.features = 64")
        return self.job.models.features


@dataclass(frozen=True)
class Holdings:
    """What a method may use of one client's data; the part for its personal test is not here."""

    train: Shard
    validation: Shard


@dataclass(frozen=True)
class ClientSite:
    """What client code may see: the problem, the parts of the group's own clients, and nothing of anybody else."""

    problem: Problem
    holdings: Mapping[int, Holdings]
    modules: Mapping[str, nn.Module]                               # structure only; the parameters are the group's state
    phase: str
    round: int
    remembered: Mapping[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def once(self, name: str, client: int, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives of a client's data, computed once in a run and by any step that asks for the name: for what no round changes.

        Remembered in memory at the client alone, made again after a resume, in no checkpoint.
        """
        if name not in self.remembered[client]:
            self.remembered[client][name] = make()
        return self.remembered[client][name]

    def stream(self, purpose: str, client: int) -> Stream:
        """The random stream of one purpose, client and this round."""
        return self.problem.stream(f"{self.phase}/{purpose}", client, self.round)

    def sizes(self, group: Group) -> Tensor:
        """Number of training images of each client of the group, (K,) float64."""
        return torch.tensor([len(self.holdings[client].train) for client in group.clients], dtype=torch.float64)

    def epochs(self, client: int, count: int, batch: int, augmentation: Augmentation = PLAIN) -> Iterable[Tree]:
        """Shuffled batches {"x": (B, C, H, W), "y": (B,)} of a client's training part, `count` times over; as they are unless augmented."""
        return epochs(self.holdings[client].train, batch, count, self.stream("batches", client), augmentation)

    def fit(self, group: Group, turns: Sequence[fit.Turn], batches: Callable[[int], Iterable[Tree]], *, context: Tree | None = None,
            frozen_norm: bool = False, keep_optimizer: bool = False, steps: int = 0, channels_last: bool | None = None) -> tuple[Group, dict[str, Tensor]]:
        """Train the group as `Problem.fit`."""
        return self.problem.fit(group, self.modules, turns, batches, context=context, frozen_norm=frozen_norm, keep_optimizer=keep_optimizer,
                                steps=steps, channels_last=channels_last, where=f"phase {self.phase}, round {self.round}")

    def train_model(self, group: Group, loss: Callable, context: Tree | None = None) -> tuple[Group, dict[str, Tensor]]:
        """The local training of the [training] section: `epochs` passes of the model over the client's own images, augmented."""
        training, augmentation = self.problem.job.training, self.problem.augmentation(soft_labels=loss is cross_entropy)
        turn = fit.Turn(("model",), loss, self.problem.optimizer())
        return self.fit(group, [turn], lambda client: self.epochs(client, training.epochs, training.batch, augmentation), context=context,
                        steps=self.steps(group))

    def steps(self, group: Group) -> int:
        """Steps that the local training of the [training] section takes in the whole run, those of the largest client of the group."""
        training = self.problem.job.training
        return -(-int(self.sizes(group).max()) // training.batch) * training.epochs * self.problem.job.federation.rounds


@dataclass(frozen=True)
class ServerSite:
    """What server code may see: the problem, the public part of the data, and a way to spread independent work over all ranks.

    `spread(verb, items, costs)` gives {key: Tree} for {key: Tree}: every rank calls the step's method of that name, `step.<verb>(its share, its own site)`, on a
    share of the items, of about equal cost; results come back to the server in host memory. `note` records one number of the round under a name, `measured` one per client:
    measured((0, 2), {"dilation_accuracy": (2,)}).
    """

    problem: Problem
    public: Shard | None
    public_validation: Shard | None
    phase: str
    round: int
    row: int                                                       # the round, counted over all phases
    spread: Callable[..., dict[int, Tree]]
    note: Callable[[str, float], None]
    measured: Callable[[Sequence[int], Mapping[str, Tensor]], None]

    def stream(self, purpose: str, client: int = -1) -> Stream:
        """The server's random stream of one purpose in this round; `client`: whose model it works on."""
        return self.problem.stream(f"server/{self.phase}/{purpose}", client, self.round)

    def fit(self, group: Group, modules: Mapping[str, nn.Module], turns: Sequence[fit.Turn], batches: Callable[[int], Iterable[Tree]], *,
            context: Tree | None = None, frozen_norm: bool = False, keep_optimizer: bool = False, steps: int = 0,
            work: str = "training", member: str = "model") -> tuple[Group, dict[str, Tensor]]:
        """Train models at the server as `Problem.fit`; the rows of the group are models here, numbered by whoever makes it.

        In errors `work` says what they are trained for and `member` what a row is.
        """
        return self.problem.fit(group, modules, turns, batches, context=context, frozen_norm=frozen_norm, keep_optimizer=keep_optimizer,
                                steps=steps, where=f"server, phase {self.phase}, round {self.round}, {work}", member=member)


@dataclass(frozen=True)
class Update:
    """What a step made of a group: its new state, what it sends up, and one number per client for each metric, name -> (K,)."""

    group: Group
    statistics: Statistics = field(default_factory=Statistics)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Algorithm(ABC):
    """One step of a federated method: state in, state out, no communicator in sight.

    A step overrides what it does differently; every default does nothing. `config` is the [algorithm] section of the job.
    """

    def __init__(self, config, problem: Problem):
        self.config, self.problem = config, problem

    def modules(self, architecture: str) -> dict[str, nn.Module]:
        """The networks of a client; their parameters live in Group.state under the names given here."""
        return {"model": self.problem.model(architecture)}

    def accept(self, counts: np.ndarray) -> None:
        """Refuse a partition that the step cannot work with; counts: training images per client and class, (K, C). Raises: DataError."""

    def found(self, site: ServerSite) -> Tree:
        """The initial server state."""
        return {}

    def join(self, group: Group, site: ClientSite) -> Group:
        """The initial client state; by default a model for each client, initialised from the client's own stream."""
        def initial(client: int) -> Tree:
            with self.problem.stream("init", client).seeding():
                return self.problem.model(group.architecture).state_dict()
        return group if group.part("model") else group.holding("model", tree.stack([initial(client) for client in group.clients]))

    def prepare(self, server: Tree, site: ServerSite) -> Tree:
        """The server's state as clients are to find it in this round: what it works out alone before it tells them anything."""
        return server

    def publish(self, server: Tree) -> Tree:
        """What every client may read."""
        return {}

    def global_models(self, message: Tree) -> Mapping[str, tuple[str, Tree]]:
        """The models in a message that belong to nobody but the federation, to be evaluated: name -> (architecture of the zoo, its state_dict)."""
        return {}

    def receive(self, message: Tree, architecture: str) -> Tree:
        """The part of the message that a client of this architecture downloads; by default all of it. Worked out at the server, for all clients alike."""
        return message

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        """Local work of a group and what it sends up."""
        return Update(group)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        """The next server state. Leaves may be written in place by torch; what NumPy or `.data` writes is not noticed, and does not reach the clients."""
        return server

    def refine(self, group: Group, message: Tree, site: ClientSite) -> Update:
        """Local work on the fresh message, after aggregation: generation and fine-tuning."""
        return Update(group)

    def draw(self, group: Group, message: Tree, site: ClientSite, per_class: int) -> tuple[Tensor, Tensor] | None:
        """Synthetic images of the group's first client to look at, (C, per_class, Cin, H, W) in [0, 1], and has (C,); None where there is no generator."""
        return None

    def seen(self, group: Group, message: Tree, site: ClientSite, x: Tensor) -> Tensor:
        """What samples of `draw` compare with: images (B, C, H, W) as the classifier reads them, in the space of the samples, (B, c, h, w)."""
        return self.problem.scale.to_unit(x)

    def generator_losses(self, group: Group, message: Tree, site: ClientSite, shard: Shard) -> Tensor:
        """The generator's own loss of each image of a shard, (n,) float64; only where a step has one."""
        raise NotImplementedError(f"{type(self).__name__} has no generator that knows a loss of one image")

    @classmethod
    def overrides(cls, verb: str) -> bool:
        """Whether this step does anything of its own under a verb; the loop skips what it does not."""
        return getattr(cls, verb) is not getattr(Algorithm, verb)


@dataclass(frozen=True)
class Phase:
    """A stretch of rounds of the same steps; each round runs the steps one after the other."""

    name: str
    rounds: int
    steps: tuple[Algorithm, ...]
    everyone: bool = False                                         # all clients take part, whatever federation.participation says

    @property
    def asks(self) -> Algorithm | None:
        """The first of the steps whose message clients are to answer; None where they only refine."""
        return next((step for step in self.steps if step.overrides("train")), None)

    @property
    def refines(self) -> Algorithm | None:
        """The first of the steps with local work on the fresh message, before which clients are evaluated."""
        return next((step for step in self.steps if step.overrides("refine")), None)


Plan = tuple[Phase, ...]
