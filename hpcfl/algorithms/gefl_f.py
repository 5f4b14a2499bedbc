"""GeFL-F (Kang, Cha, Kang, arXiv 2412.18460): GeFL whose generator makes the maps of a feature extractor that all clients share.

(i) The common extractor warms up by LG-FedAvg: theta^f averaged over all clients, headers within each architecture. (ii) theta^f is frozen; clients train
the generator on h = theta^f(x). (iii) Headers learn from samples of it and from h; theta^f stays as it is, bit for bit. Section numbers are those of the
specification.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from hpcfl import tree
from hpcfl.algorithms import gefl
from hpcfl.algorithms.gefl import TeachStep, TrainGenerator, build_generator, plan_stages
from hpcfl.algorithms.lg_fedavg import COMMON, LgFedAvg
from hpcfl.contract import Algorithm, ClientSite, Group, Phase, Plan, Problem, Sums, Turn, Uplink, integer
from hpcfl.data.augment import Augmentation
from hpcfl.data.shards import Shard, iterate_epochs
from hpcfl.models.classifier import Shape
from hpcfl.streams import Stream
from hpcfl.training.evaluate import apply_in_batches, bind
from hpcfl.tree import Tree

EXTRACTOR = "extractor."


@dataclass(frozen=True)
class Config(gefl.Config):
    """The settings of GeFL, and T_FE; federation.rounds is T_TN."""

    warmup_rounds: int = integer(20, 1, meaning="rounds that train the common extractor, T_FE")

    @property
    def shared(self) -> str:
        """What LG-FedAvg averages over all clients."""
        return "features"

    @property
    def rest(self) -> str:
        """Where it averages the rest."""
        return "architecture"


class Maps:
    """Maps of the frozen common extractor, h = theta^f(x)."""

    def __init__(self, config: Config, problem: Problem):
        self.problem = problem
        self.model = problem.structure(problem.sizes.every[0])
        self.generative = build_generator(config, cast(Shape, self.model.maps_shape), problem.classes, True)

    def batches(self, message: Tree, site: ClientSite, client: int, count: int, batch: int) -> Iterator[Tree]:
        """Of images augmented as for the classifier, but never mixed: a generator draws single classes."""
        augmentation = self.problem.augmentation(soft_labels=True).unmixed
        return self.epochs(message, site, client, count, batch, site.stream("generator batches", client), augmentation)

    def epochs(self, message: Tree, site: ClientSite, client: int, count: int, batch: int, stream: Stream, augmentation: Augmentation) -> Iterator[Tree]:
        """Shuffled batches {"x": (B, *generative.shape), "y"} of the maps of a client's training images, `count` times over; augmented ones are mapped anew."""
        if not augmentation.words:
            return iterate_epochs(self.encode_own(message, site, client), batch, count, stream)
        extract, images = self.extractor(message), iterate_epochs(site.holdings[client].train, batch, count, stream, augmentation)
        return ({"x": extract(each["x"]), "y": each["y"]} for each in images)

    def encode_own(self, message: Tree, site: ClientSite, client: int) -> Shard:
        """The maps of a client's training images with their labels, made once: neither images nor extractor change any more."""
        shard = site.holdings[client].train
        maps = site.once("maps", client, lambda: apply_in_batches(self.extractor(message), shard))
        return Shard(maps, shard.labels, shard.scale)

    def extractor(self, message: Tree) -> Callable[[Tensor], Tensor]:
        """theta^f of a message: classifier input -> maps."""
        state = {path.removeprefix(EXTRACTOR): leaf for path, leaf in take_extractor(message).items()}
        return bind(self.model.extractor, tree.to(state, self.problem.device))

    def from_images(self, message: Tree, x: Tensor) -> Tensor:
        return self.extractor(message)(x)

    def to_classifier(self, samples: Tensor) -> Tensor:
        return samples

    def to_pictures(self, samples: Tensor) -> Tensor:
        return samples


def take_extractor(message: Tree) -> Tree:
    """theta^f in a message as published, or as a client received it."""
    return tree.part(message, COMMON) or {path: leaf for path, leaf in message.items() if path.startswith(EXTRACTOR)}


class TrainMapGenerator(TrainGenerator):
    """Feature-generative aggregation (2.2, stage ii): the extractor goes down with the generator, and nothing of it comes up."""

    def publish(self, server: Tree) -> Tree:
        return super().publish(server) | tree.join(**{COMMON: tree.part(server, COMMON)})


class TrainHeaders(TeachStep, LgFedAvg):
    """Header training (2.2, stage iii)."""

    config: Config  # type: ignore[assignment]  # has what LG-FedAvg asks of its own
    space: Maps

    def turn(self) -> Turn:
        return Turn(("model",), header_cross_entropy, self.problem.optimizer(), lambda path: not path.startswith(f"model/{EXTRACTOR}"))

    def train_on_own(self, group: Group, message: Tree, site: ClientSite) -> tuple[Group, dict[str, Tensor]]:
        """T_r epochs on the maps of the client's own images; augmented images go through the extractor anew."""
        training, augmentation = self.problem.job.training, self.problem.augmentation(soft_labels=True)
        return site.fit(group, [self.turn()], lambda client: self.space.epochs(message, site, client, training.epochs, training.batch,
                                                                               site.stream("batches", client), augmentation),
                        steps=self.steps(group, site, training.epochs))

    def upload(self, group: Group, site: ClientSite) -> Uplink:
        return Uplink({group.architecture: Sums.weighted(group.clients, self.take_others(tree.select_floating(group.part("model"))), site.sizes(group))})


def header_cross_entropy(modules, batch: Tree, context: Tree) -> Tensor:
    """CE(header(h), y), mean over the batch."""
    return F.cross_entropy(modules.model.header(batch["x"]), batch["y"])


def plan(config: Config, problem: Problem) -> Plan:
    """T_FE rounds of warm-up, then T_KA and T_TN as in GeFL.

    Raises: JobError for models without one common extractor, and for maps that the generator does not take.
    """
    warmup = Phase("warmup", config.warmup_rounds, (LgFedAvg(config, problem),))  # type: ignore[arg-type]  # as above
    space = Maps(config, problem)

    def generator(first: int) -> Algorithm:
        return TrainMapGenerator(config, problem, space, first)
    return (warmup, *plan_stages(config, problem, generator, lambda continued: TrainHeaders(config, problem, space, continued)))
