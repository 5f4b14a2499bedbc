"""GeFL (Kang, Cha, Kang, arXiv 2412.18460): clients train one generative model federatedly, then each its own classifier on what it draws and on its images.

Generative knowledge aggregation: w_g goes down, every client trains it on its images for T_g epochs with Adam moments of its own, w_k come up,
w_g <- mean_k w_k. Target training: T_s epochs on samples of G(z | y), y uniform, then T_r on the own images; FedAvg within each architecture. A DCGAN
goes on training during the target rounds. Section numbers are those of the specification.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from hpcfl import tree
from hpcfl.algorithms.fedavg import FedAvg, average_parts
from hpcfl.contract import (
    Algorithm,
    ClientSite,
    DataError,
    Group,
    JobError,
    LayoutError,
    Phase,
    Plan,
    Problem,
    ServerSite,
    Sums,
    Totals,
    Turn,
    Update,
    Uplink,
    choice,
    choice_of,
    integer,
    real,
)
from hpcfl.data.shards import Shard, iterate_epochs
from hpcfl.generators.class_vtc import Vtc
from hpcfl.generators.cvae import Cvae
from hpcfl.generators.dcgan import Dcgan
from hpcfl.generators.ddpm import Ddpm
from hpcfl.generators.generative import GenerativeModel
from hpcfl.models.classifier import Shape
from hpcfl.streams import Stream
from hpcfl.training.compiling import compiles
from hpcfl.training.evaluate import BATCH, bind
from hpcfl.training.group import OPTIMIZER
from hpcfl.training.losses import cross_entropy
from hpcfl.training.turns import Modules
from hpcfl.tree import Tree

GENERATOR = "generator"                                            # of the networks of a generative model the one that draws
NOISES = 4                                                         # draws of a step's noise over which a generator's loss of one image is averaged
EVERYBODY = -1                                                     # in a Stream: no client's own
SMALLEST = 2                                                       # images of a client: BatchNorm over 1x1 maps has no variance of one


GENERATORS: dict[str, Callable[..., GenerativeModel]] = {              # (Config, shape, classes, whether of features) -> the network and its losses
    "cvae": lambda config, shape, classes, features: Cvae(shape, classes, config.latent,
                                                          value_range="features" if features else config.image_range),
    "dcgan": lambda config, shape, classes, features: Dcgan(shape, classes, config.width_g, config.width_d,
                                                            value_range="features" if features else "symmetric"),
    "ddpm": lambda config, shape, classes, features: Ddpm(shape, classes, config.steps, config.width, guidance=config.guidance, ddim_steps=config.ddim_steps,
                                                          value_range="features" if features else config.image_range),
    "vtc": lambda config, shape, classes, features: Vtc(shape, classes, config.latent, value_range="features" if features else "symmetric"),
}


@dataclass(frozen=True)
class Config:
    """The settings of GeFL; federation.rounds is T_TN, training.epochs T_r. Defaults are those of the paper's MNIST runs."""

    generator: str = choice_of(GENERATORS, "cvae", meaning="the common generator; vtc: FedVTC's network with class Gaussians, ours")
    generator_rounds: int = integer(100, 1, meaning="rounds that train the generator, T_KA")
    generator_epochs: int = integer(5, 1, meaning="passes over a client's own images in such a round, T_g")
    generator_batch: int = integer(0, 0, meaning="batch size of the generator; 0: training.batch", unit="images")
    generator_lr: float = real(0.0, 0.0, meaning="learning rate of the generator; 0: the generator's own")
    generator_weights: str = choice("clients", "images", meaning="of the clients' generators in their mean; clients: all alike, as published; images: by n_k")
    continued_rounds: int = integer(-1, -1, meaning="how many of T_KA run during the target rounds; -1: half of them for dcgan, else none", unit="rounds")
    synthetic_epochs: int = integer(1, 0, meaning="passes over synthetic images in a target round, T_s")
    pool: str = choice("client", "round", meaning="client: fresh samples for every client; round: the same for all, drawn once per round and rank")
    range_mode: str = choice("matched", "paper", meaning="matched: samples in the classifier's range; paper: as the generator draws them")
    image_range: str = choice("unit", "symmetric", meaning="of cvae, ddpm: the range that they draw in; symmetric is a branch of the code for CIFAR-10")
    latent: int = integer(16, 1, meaning="of cvae: latent size, 50 for CIFAR-10; of vtc: number of coefficients")
    width_g: int = integer(128, 2, meaning="of dcgan: width of the generator, 256 for CIFAR-10")
    width_d: int = integer(128, 2, meaning="of dcgan: width of the discriminator, 64 for CIFAR-10")
    steps: int = integer(100, 1, meaning="of ddpm: T, 400 for CIFAR-10, 500 of features")
    width: int = integer(128, 8, meaning="of ddpm: n_feat")
    guidance: float = real(0.0, 0.0, meaning="of ddpm: weight of the guidance, w")
    ddim_steps: int = integer(0, 0, meaning="of ddpm: steps of DDIM sampling; 0: ancestral sampling in T steps")


def build_generator(config: Config, shape: Shape, classes: int, features: bool) -> GenerativeModel:
    """The configured generator of images, or of an extractor's maps. Raises: JobError for shapes and settings that it does not have."""
    try:
        return GENERATORS[config.generator](config, shape, classes, features)
    except LayoutError as error:
        raise JobError(f"algorithm.generator = '{config.generator}' for {'maps of the common extractor' if features else 'images'}: {error}") from None


class Space(Protocol):
    """What a generator learns from and draws: images, or maps between the client's images and its classifier."""

    generative: GenerativeModel

    def batches(self, message: Tree, site: ClientSite, client: int, count: int, batch: int) -> Iterator[Tree]:
        """Shuffled batches {"x": (B, *generative.shape), "y": (B,)} of the client's own, `count` times over."""

    def from_images(self, message: Tree, x: Tensor) -> Tensor:
        """Classifier input (B, C, H, W) as the generator would make it, (B, *generative.shape)."""

    def to_classifier(self, samples: Tensor) -> Tensor:
        """Samples (B, *generative.shape) as the classifier takes them."""

    def to_pictures(self, samples: Tensor) -> Tensor:
        """Samples for people to look at: images in [0, 1], or what stands for them."""


class Images:
    """Images in the generator's own range of values."""

    def __init__(self, config: Config, problem: Problem):
        self.scale, self.matched = problem.scale, config.range_mode == "matched"
        self.generative = build_generator(config, problem.shape, problem.classes, False)

    def batches(self, message: Tree, site: ClientSite, client: int, count: int, batch: int) -> Iterator[Tree]:
        for each in iterate_epochs(site.holdings[client].train, batch, count, site.stream("generator batches", client)):
            yield {"x": self.from_images(message, each["x"]), "y": each["y"]}

    def from_images(self, message: Tree, x: Tensor) -> Tensor:
        return self.scale.to_unit(x) if self.generative.value_range == "unit" else self.scale.to_symmetric(x)

    def to_classifier(self, samples: Tensor) -> Tensor:
        return self.scale.from_symmetric(self.to_symmetric(samples)) if self.matched else samples

    def to_pictures(self, samples: Tensor) -> Tensor:
        return (self.to_symmetric(samples) + 1).div(2).clamp(0, 1)

    def to_symmetric(self, samples: Tensor) -> Tensor:
        """Samples in [-1, 1], as far as the generator keeps to its range."""
        return 2 * samples - 1 if self.generative.value_range == "unit" else samples


class GeneratorStep(Algorithm):
    """What the steps of both stages share: the networks of the generator, and drawing from it."""

    config: Config

    def __init__(self, config: Config, problem: Problem, space: Space):
        super().__init__(config, problem)
        self.space, self.generative = space, space.generative
        self.structure = self.initialise("structure")              # the same for clients of every architecture
        self.networks = tuple(self.structure)                      # their names, and the parts of the server's state that hold w_g

    def modules(self, architecture: str) -> dict[str, nn.Module]:
        return super().modules(architecture) | self.structure

    def initialise(self, purpose: str) -> dict[str, nn.Module]:
        """New networks from one common stream."""
        with self.problem.stream(purpose).seeding():
            return self.generative.networks()

    def accept(self, counts: np.ndarray) -> None:
        if len(missing := np.flatnonzero(counts.sum(0) == 0)):
            raise DataError(f"{self.problem.job.algorithm_name} draws samples of all {counts.shape[1]} classes, but no client has a training image of class "
                            f"{', '.join(map(str, missing))}; raise data.fraction, or choose another data.partition or data.name")
        if (least := counts.sum(1).min()) < SMALLEST:
            raise DataError(f"client {counts.sum(1).argmin()} has {least} training image, a generator needs {SMALLEST} for its norms; raise data.fraction or "
                            "use fewer clients")

    def build_drawer(self, message: Tree, site: ClientSite, compile: bool = False) -> Callable[[Tensor, torch.Generator], Tensor]:
        """Samples (B, *generative.shape) of labels (B,), G in eval mode and without gradients."""
        call = bind(site.modules[GENERATOR], tree.to(tree.part(message, GENERATOR), self.problem.device), compile=compile)
        return lambda y, random: self.generative.sample(call, y, random)

    def draw(self, group: Group, message: Tree, site: ClientSite, per_class: int) -> tuple[Tensor, Tensor]:
        classes, draw = self.problem.classes, self.build_drawer(message, site)
        random = site.stream("sample", group.clients[0]).torch(self.problem.device)
        samples = [draw(torch.full((per_class,), y, device=self.problem.device), random) for y in range(classes)]
        return self.space.to_pictures(torch.stack(samples)), torch.ones(classes, dtype=torch.bool)

    def seen(self, group: Group, message: Tree, site: ClientSite, x: Tensor) -> Tensor:
        return self.space.to_pictures(self.space.from_images(message, x))


class TrainGenerator(GeneratorStep):
    """Generative knowledge aggregation (2.1, stage 1), rounds `first` and on of T_KA."""

    def __init__(self, config: Config, problem: Problem, space: Space, first: int = 0):
        super().__init__(config, problem, space)
        self.first, self.batch = first, config.generator_batch or problem.job.training.batch
        if self.batch < SMALLEST:
            raise JobError(f"algorithm.generator_batch = {config.generator_batch} with training.batch = {problem.job.training.batch} trains the generator on "
                           f"batches of {self.batch}, its norms need {SMALLEST}; set algorithm.generator_batch to at least {SMALLEST}")

    def found(self, site: ServerSite) -> Tree:
        return tree.join(**{name: tree.select_floating(network.state_dict()) for name, network in self.initialise("init/generator").items()})

    def publish(self, server: Tree) -> Tree:
        return {path: leaf for path, leaf in server.items() if path.startswith(tuple(f"{name}/" for name in self.networks))}

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        config, resting, received = self.config, group, tree.to(message, self.problem.device)
        for name in self.networks:                                 # batch counters, which nobody reads, are not sent
            group = group.with_common_part(name, site.modules[name].state_dict() | tree.part(received, name))
        images = site.sizes(group)
        group, metrics = site.fit(group, self.turns(site.round), lambda client: self.batches(message, site, client, self.batch), keep_optimizer=True,
                                  channels_last=self.generative.channels_last,
                                  steps=config.generator_rounds * config.generator_epochs * int(images.max()) // self.batch)
        by_images = config.generator_weights == "images"
        weights = images if by_images else torch.ones_like(images)
        w = {name: Sums.weighted(group.clients, tree.select_floating(group.part(name)), weights, weights_sent=by_images and name == GENERATOR)
             for name in self.networks}
        kept = {path: leaf for path, leaf in group.state.items() if path in resting.state or path.startswith(f"{OPTIMIZER}/")}
        return Update(replace(group, state=kept), Uplink(w), {f"generator_{name}": values for name, values in metrics.items()})

    def turns(self, round_: int) -> list[Turn]:
        """One step of each loss per batch; a rate that decays falls linearly over T_KA and is above zero in the last round."""
        left = 1 - (self.first + round_) / self.config.generator_rounds if self.generative.decay == "linear" else 1.0
        rules = [self.rule(**vars(rule) | {"setting": "generator_lr", "lr": (self.config.generator_lr or rule.lr) * left}) for rule in self.generative.rules()]
        return [Turn(trained, loss, rule) for (trained, loss), rule in zip(self.generative.losses(), rules, strict=True)]

    def batches(self, message: Tree, site: ClientSite, client: int, batch: int) -> Iterator[Tree]:
        """T_g epochs of the client's own with the random draws of each step."""
        random = site.stream("generator noise", client).torch(self.problem.device)
        for each in self.space.batches(message, site, client, self.config.generator_epochs, batch):
            yield self.generative.noise({"x": each["x"], "y": each["y"]}, random)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        return average_parts(server, totals)

    def generator_losses(self, group: Group, message: Tree, site: ClientSite, shard: Shard) -> Tensor:
        """The generator's loss of data for each image alone, in eval mode, the mean over NOISES draws of its noise."""
        networks, device = self.initialise("structure"), self.problem.device
        for name, network in networks.items():
            network.load_state_dict(tree.part(message, name), strict=False)               # batch counters are not in the message
        modules, loss, random = Modules(networks).to(device).eval(), self.generative.data_loss(), site.stream("audit", group.clients[0]).torch(device)
        alone = vmap(lambda row: modules(loss, {name: leaf.unsqueeze(0) for name, leaf in row.items()}, {})[0])

        @torch.no_grad()
        def losses(block: slice) -> Tensor:
            data = {"x": self.space.from_images(message, shard.pixels(block)), "y": shard.labels[block]}
            return sum(alone(self.generative.noise(data, random)).double() for _ in range(NOISES)) / NOISES
        return torch.cat([losses(slice(start, start + BATCH)) for start in range(0, len(shard), BATCH)])


class TeachStep(GeneratorStep):
    """Target training (2.1, stage 2), what GeFL and GeFL-F share: T_s epochs on samples, then T_r on the own data, each with a new optimiser."""

    def __init__(self, config: Config, problem: Problem, space: Space, continued: bool):
        """`continued`: whether the generator goes on training in these rounds."""
        super().__init__(config, problem, space)
        self.continued = continued

    def publish(self, server: Tree) -> Tree:
        unused = tuple(f"{name}/" for name in self.networks if name != GENERATOR)
        return {path: leaf for path, leaf in server.items() if not path.startswith(unused)}

    def receive(self, message: Tree, architecture: str) -> Tree:
        return super().receive(message, architecture) | tree.join(**{GENERATOR: tree.part(message, GENERATOR)})

    def adopt(self, group: Group, message: Tree) -> Group:
        received = {path: leaf for path, leaf in message.items() if not path.startswith(f"{GENERATOR}/")}
        return super().adopt(group, received)  # type: ignore[misc]  # of the averaging step that it is mixed into

    def learn(self, group: Group, message: Tree, site: ClientSite) -> tuple[Group, dict[str, Tensor]]:
        if not self.continued:
            group = group.without(OPTIMIZER)                       # of the generator, which rests from now on
        draw, metrics = self.build_drawer(message, site, self.draws_often(group, site)), {}
        if self.config.synthetic_epochs:
            group, drawn = site.fit(group, [self.turn()], lambda client: self.draw_batches(draw, site, client),
                                    steps=self.steps(group, site, self.config.synthetic_epochs))
            metrics["synthetic_loss"] = drawn["loss"]
        group, own = self.train_on_own(group, message, site)
        return group, own | metrics

    def turn(self) -> Turn:
        """How a batch trains the model."""
        return Turn(("model",), cross_entropy, self.problem.optimizer())

    def steps(self, group: Group, site: ClientSite, count: int) -> int:
        """Steps that `count` epochs take in the whole run."""
        return max(1, int(site.sizes(group).max()) // self.problem.job.training.batch) * count * self.problem.job.federation.rounds

    def draws_often(self, group: Group, site: ClientSite) -> bool:
        """Whether sampling calls G so often that it is compiled; never where one call draws a batch."""
        calls = self.generative.calls * self.steps(group, site, self.config.synthetic_epochs) * len(group.clients)
        return self.generative.calls > 1 and compiles(self.problem.job.run.compile, self.problem.device.type, calls)

    def train_on_own(self, group: Group, message: Tree, site: ClientSite) -> tuple[Group, dict[str, Tensor]]:
        """T_r epochs on the client's own images."""
        return site.train_model(group, cross_entropy)

    def draw_batches(self, draw: Callable[[Tensor, torch.Generator], Tensor], site: ClientSite, client: int) -> Iterator[Tree]:
        """max(1, floor(n_k / B)) batches of B samples (n_k, where that is fewer) for each of T_s epochs, y uniform over all classes (2.1)."""
        own, wanted = len(site.holdings[client].train), self.problem.job.training.batch
        size, pool = min(own, wanted), self.pool(site)
        for number in range(self.config.synthetic_epochs * max(1, own // wanted)):
            if pool is None:
                x, y = self.samples(draw, wanted, site.stream(f"synthetic/{number}", client))
            else:
                if number not in pool:
                    pool[number] = self.samples(draw, wanted, site.stream(f"synthetic/{number}", EVERYBODY))
                x, y = pool[number]
            yield {"x": x[:size], "y": y[:size]}

    def samples(self, draw: Callable[[Tensor, torch.Generator], Tensor], count: int, stream: Stream) -> tuple[Tensor, Tensor]:
        """A batch of samples as the classifier takes them, and their labels."""
        random = stream.torch(self.problem.device)
        y = torch.randint(self.problem.classes, (count,), generator=random, device=self.problem.device)
        return self.space.to_classifier(draw(y, random)), y

    def pool(self, site: ClientSite) -> dict[int, tuple[Tensor, Tensor]] | None:
        """The batches that this rank has drawn in this round, by number; each follows from round and number, so that all ranks draw the same."""
        if self.config.pool == "client":
            return None
        return site.once_for_all("pool", (site.phase, site.round), dict)


class TrainTargets(TeachStep, FedAvg):
    """theta_m <- FedAvg within architecture m, of classifiers that learned from samples and from images."""


def plan(config: Config, problem: Problem) -> Plan:
    """T_KA generator rounds, then T_TN target rounds; where the generator goes on training, the two overlap in rounds of both steps (2.1)."""
    space = Images(config, problem)
    return plan_stages(config, problem, lambda first: TrainGenerator(config, problem, space, first),
                       lambda continued: TrainTargets(config, problem, space, continued))


def plan_stages(config: Config, problem: Problem, generator: Callable[[int], Algorithm], targets: Callable[[bool], Algorithm]) -> Plan:
    """The phases from generator training on; generator(first round), targets(whether the generator goes on training)."""
    rounds = problem.job.federation.rounds
    wanted = config.continued_rounds if config.continued_rounds >= 0 else config.generator_rounds // 2 if config.generator == "dcgan" else 0
    both = min(wanted, rounds, config.generator_rounds)
    before = config.generator_rounds - both
    phases = (Phase("generator", before, (generator(0),)), Phase("both", both, (targets(True), generator(before))),
              Phase("targets", rounds - both, (targets(False),)))
    return tuple(phase for phase in phases if phase.rounds)
