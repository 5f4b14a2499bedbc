"""Problem: what everybody knows about the experiment."""
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from hpcfl.data.augment import OF_IMAGES, Augmentation
from hpcfl.data.shards import Scale
from hpcfl.errors import JobError
from hpcfl.models import zoo
from hpcfl.models.classifier import Model
from hpcfl.models.sizes import Sizes
from hpcfl.settings.job import Job
from hpcfl.streams import Stream
from hpcfl.training import fit
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn
from hpcfl.tree import Tree


@dataclass(frozen=True)
class Problem:
    """What everybody knows about the experiment: the job, the images' shape and scale, the classes, who has which architecture."""

    job: Job
    shape: tuple[int, int, int]                                    # (C, H, W) as the models see it
    classes: int
    scale: Scale
    sizes: Sizes                                                   # who has which architecture
    device: torch.device
    structures: dict[str, Model] = field(default_factory=dict, repr=False, compare=False)          # architecture -> what `structure` built

    @cached_property
    def architectures(self) -> tuple[str, ...]:
        """The architectures of clients 0 to K-1 in the first round."""
        return tuple(self.architecture(client, 0) for client in range(self.sizes.clients))

    def architecture(self, client: int, row: int) -> str:
        """The architecture that a client trains in a round; `row` is the round's number over all phases."""
        return self.sizes.architecture(client, row)

    def model(self, architecture: str) -> Model:
        """A newly initialised model of the zoo."""
        models = self.job.models
        return zoo.build(architecture, self.shape, self.classes, models.feature_size, models.norm, models.feature_relu)

    def structure(self, architecture: str) -> Model:
        """A model of the zoo on the device whose weights do not matter, to compute with somebody's state.

        It is built once and is the same object for everybody: take a copy to change anything of it.
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
        return Optimizer.from_settings(self.job.training)

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

    def fit(self, group: Group, modules: Mapping[str, nn.Module], turns: Sequence[Turn], batches: Callable[[int], Iterable[Tree]], *,
            context: Tree | None = None, frozen_norm: bool = False, keep_optimizer: bool = False, steps: int = 0, channels_last: bool | None = None,
            where: str = "fit", member: str = "client", streams: Callable[[int], Stream] | None = None) -> tuple[Group, dict[str, Tensor]]:
        """Train a group by the one training loop, with the engine, precision and compilation of the job.

        `steps`: those of one model in the whole run, by which compiling pays or not. `streams`: client -> the stream of what its training draws from global
        generators; by default that of `where` and the client.
        """
        training, run = self.job.training, self.job.run
        return fit.fit(group, modules, turns, batches, context=context, frozen_norm=frozen_norm, keep_optimizer=keep_optimizer,
                       engine="sequential" if run.deterministic else training.engine, compile=run.compile, precision=training.precision,
                       channels_last=channels_last, expected_steps=steps, where=where, member=member, origin=f"lower {self.rates()}",
                       streams=streams or partial(self.stream, where))

    def rates(self) -> str:
        """The learning rates of the job with their values, for errors about states that are not finite."""
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
