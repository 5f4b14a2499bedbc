"""What an algorithm is: a few verbs over Trees, what it may see at a client and at the server, and the plan that puts its steps in order."""
import copy
from abc import ABC
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.data.augment import OF_IMAGES, Augmentation
from hpcfl.data.shards import PLAIN, Scale, Shard, epochs
from hpcfl.errors import JobError
from hpcfl.models import zoo
from hpcfl.models.sizes import Sizes
from hpcfl.settings.job import Job
from hpcfl.streams import Stream
from hpcfl.training import fit, turns
from hpcfl.training.evaluate import features
from hpcfl.training.group import Group
from hpcfl.training.losses import cross_entropy
from hpcfl.training.optimizers import Optimizer
from hpcfl.tree import Tree
from hpcfl.wire.communicator import Total
from hpcfl.wire.uplink import Statistics, Uploads

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
    structures: dict[str, nn.Module] = field(default_factory=dict, repr=False, compare=False)          # architecture -> what `structure` built

    @cached_property
    def architectures(self) -> tuple[str, ...]:
        """Those of client 0 .. K-1 in the first round."""
        return tuple(self.architecture(client, 0) for client in range(self.sizes.clients))

    def architecture(self, client: int, row: int) -> str:
        """What a client trains in a round, rows counted over all phases."""
        return self.sizes.architecture(client, row)

    def model(self, architecture: str) -> nn.Module:
        """A newly initialised model of the zoo."""
        models = self.job.models
        return zoo.build(architecture, self.shape, self.classes, models.feature_size, models.norm, models.feature_relu)

    def structure(self, architecture: str) -> nn.Module:
        """A model of the zoo on the device whose weights do not matter, to compute with somebody's state.

        Built once, and the same object for everybody: who changes anything of it takes a copy.
        """
        if architecture not in self.structures:
            with self.stream("structure").seeding():
                self.structures[architecture] = self.model(architecture).to(self.device)
        return self.structures[architecture]

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

    def fit(self, group: Group, modules: Mapping[str, nn.Module], turns: Sequence[turns.Turn], batches: Callable[[int], Iterable[Tree]], *,
            context: Tree | None = None, frozen_norm: bool = False, keep_optimizer: bool = False, steps: int = 0, channels_last: bool | None = None,
            where: str = "fit", member: str = "client", streams: Callable[[int], Stream] | None = None) -> tuple[Group, dict[str, Tensor]]:
        """Train a group by the one training loop, with the engine, precision and compilation of the job; `steps`: of one model in the whole run.

        `streams`: client -> what it draws from where it uses global generators; by default the one of `where` and the client.
        """
        training, run = self.job.training, self.job.run
        return fit.fit(group, modules, turns, batches, context=context, frozen_norm=frozen_norm, keep_optimizer=keep_optimizer,
                       engine="sequential" if run.deterministic else training.engine, compile=run.compile, precision=training.precision,
                       channels_last=channels_last, expected_steps=steps, where=where, member=member, origin=f"lower {self.rates()}",
                       streams=streams or partial(self.stream, where))

    def rates(self) -> str:
        """The learning rates that the job sets, with their values: what may have made a state that nobody can go on with."""
        own = {name: value for name, value in vars(self.job.algorithm).items() if name.endswith("lr") and value}
        return " or ".join(f"{name} = {value:g}" for name, value in {**{f"algorithm.{name}": value for name, value in own.items()},
                                                                     "training.lr": self.job.training.lr}.items())

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

        Raises: JobError where models.feature_size = 0 leaves every model its own.
        """
        if self.job.models.feature_size == 0:
            raise JobError(f"models.feature_size = 0 lets every model keep its own feature size, but {self.job.algorithm_name} exchanges features; "
                           "wanted one common size, for example models.feature_size = 64")
        return self.job.models.feature_size


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
    trainings: Counter[int] = field(default_factory=Counter)       # client -> how often it was trained in this round, by whatever step

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

    def features(self, group: Group, client: int) -> Tensor:
        """z = g_k(x) of a client's training images, (n, p), in eval mode and without gradients. Raises: NonFiniteError naming the client."""
        return features(group, self.modules, client, self.holdings[client].train, f"phase {self.phase}, round {self.round}", self.problem.optimizer().advice)

    def fit(self, group: Group, turns: Sequence[turns.Turn], batches: Callable[[int], Iterable[Tree]], *, context: Tree | None = None,
            frozen_norm: bool = False, keep_optimizer: bool = False, steps: int = 0, channels_last: bool | None = None) -> tuple[Group, dict[str, Tensor]]:
        """Train the group as `Problem.fit`."""
        streams = {client: self.stream(f"training {self.trainings[client]}", client) for client in group.clients}
        self.trainings.update(group.clients)                       # so that no training repeats the draws of the one before
        return self.problem.fit(group, self.modules, turns, batches, context=context, frozen_norm=frozen_norm, keep_optimizer=keep_optimizer,
                                steps=steps, channels_last=channels_last, where=f"phase {self.phase}, round {self.round}", streams=streams.__getitem__)

    def train_model(self, group: Group, loss: Callable, context: Tree | None = None) -> tuple[Group, dict[str, Tensor]]:
        """The local training of the [training] section: `epochs` passes of the model over the client's own images, augmented."""
        training, augmentation = self.problem.job.training, self.problem.augmentation(soft_labels=loss is cross_entropy)
        turn = turns.Turn(("model",), loss, self.problem.optimizer())
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

    def fit(self, group: Group, modules: Mapping[str, nn.Module], turns: Sequence[turns.Turn], batches: Callable[[int], Iterable[Tree]], *,
            context: Tree | None = None, frozen_norm: bool = False, keep_optimizer: bool = False, steps: int = 0,
            work: str = "training", member: str = "model") -> tuple[Group, dict[str, Tensor]]:
        """Train models at the server as `Problem.fit`; the rows of the group are models here, numbered by whoever makes it.

        In errors `work` says what they are trained for and `member` what a row is. What draws from a global generator draws the same where a row is trained
        twice in a round for the same work.
        """
        return self.problem.fit(group, modules, turns, batches, context=context, frozen_norm=frozen_norm, keep_optimizer=keep_optimizer,
                                steps=steps, where=f"server, phase {self.phase}, round {self.round}, {work}", member=member,
                                streams=partial(self.stream, f"training/{work}"))


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

    refines: ClassVar[str] = "refine"                              # what `refine` does, a key of measures.REFINING: reports name the models by it

    def __init__(self, config, problem: Problem):
        self.config, self.problem = config, problem

    def modules(self, architecture: str) -> dict[str, nn.Module]:
        """The networks of a client; their parameters live in Group.state under the names given here.

        A network that no client holds is what it is built as: inside a stream, so that it is the same on all ranks and after a restart; and for clients of
        all architectures, unless something is drawn before it that depends on theirs. What this default gives draws nothing.
        """
        return {"model": copy.deepcopy(self.problem.structure(architecture))}

    def rule(self, name: str, setting: str, lr: float | None = None, **others: Any) -> Optimizer:
        """An update rule at the rate of one of the step's settings, or at an `lr` that follows from it; its gradients are not clipped."""
        value = getattr(self.config, setting)
        at_work = "" if lr in (None, value) else f", at work {lr:g}"
        return Optimizer(name, value if lr is None else lr, rate_setting=f"algorithm.{setting} = {value:g}{at_work}", **others)

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

    def averages(self, architecture: str) -> tuple[str, ...]:
        """The parts of models that a client of this architecture averages with all clients that name them too; none by default."""
        return ()

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
    def refiner(self) -> Algorithm | None:
        """The first of the steps with local work on the fresh message, before which clients are evaluated."""
        return next((step for step in self.steps if step.overrides("refine")), None)


Plan = tuple[Phase, ...]
