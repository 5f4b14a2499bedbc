"""FedGen (Zhu, Hong, Zhou, ICML 2021, arXiv 2105.10056): without any data the server learns a generator of features from the heads of the clients.

One round: (1) clients take the generator G and the head, train on their images and on what G draws, and send their heads and how many images of each
class they have; (2) the server averages the heads, and trains G until they take its features for the class that was wished for. For models of
different architectures (ours): features have one size p, of a model only the head is exchanged, and extractors stay with their clients. The authors
also average whole models, where these are equal.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.algorithms.shared_head import HEAD, SharedHead, take_head
from hpcfl.contract import ClientSite, Phase, Plan, Problem, ServerSite, Totals, Update, Uplink, Uploads, choice_of, integer, real
from hpcfl.training.evaluate import bind
from hpcfl.training.group import OPTIMIZER, Group
from hpcfl.training.losses import cross_entropy
from hpcfl.training.turns import Turn
from hpcfl.tree import Tree


def weighted_teacher(logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """Mean over the batch of sum_k share_k^y CE(logits_k, y); logits (K, B, C), share (K, C) with columns that sum to 1."""
    errors = -logits.log_softmax(2).gather(2, labels.expand(len(logits), -1).unsqueeze(2)).squeeze(2)              # (K, B)
    return (share[:, labels] * errors).sum(0).mean()


def ensemble_teacher(logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """CE(mean_k logits_k, y), mean over the batch."""
    return F.cross_entropy(logits.mean(0), labels)


NOISES = {"normal": torch.randn, "uniform": torch.rand}
TEACHERS = {"weighted": weighted_teacher, "ensemble": ensemble_teacher}


@dataclass(frozen=True)
class Config:
    """The settings of FedGen; numbers without a word are those of the published code for MNIST.

    With the code's alpha = beta = 10 steps must be small: on digits with training.lr = 0.1 no client learned anything.
    """

    alpha: float = real(1.0, 0.0, meaning="weight of CE(h(G(eps, y')), y') in a client's loss, the paper's formula; code: 10")
    beta: float = real(0.0, 0.0, meaning="weight of KL(h(G(eps, y)) || f(x)), which is not in the formula; code: 10")
    decay: float = real(0.98, 0.0, 1.0, above=True, meaning="factor on alpha, beta and server_lr a round")
    per_batch: int = integer(32, 1, meaning="features drawn beside a batch of images")
    teacher: str = choice_of(TEACHERS, "weighted", meaning="the generator's loss; weighted: CE of each head, by its share of the class's images, as the code; "
                                                           "ensemble: CE of the heads' mean logits, as the paper's formula")
    noise: str = choice_of(NOISES, "normal", meaning="distribution of eps; normal: N(0, I), the paper's; uniform: U(0, 1), the code's")
    noise_size: int = integer(32, 1, meaning="size of eps")
    hidden: int = integer(256, 1, meaning="hidden width of the generator")
    diversity: float = real(1.0, 0.0, meaning="weight of the diversity loss; it is not in the paper's formula")
    server_steps: int = integer(50, 1, meaning="steps of the generator in a round")
    server_batch: int = integer(32, 2, meaning="batch size of the generator; diversity needs two", unit="features")
    server_lr: float = real(3e-4, 0.0, above=True, meaning="learning rate of the generator (Adam, whose state goes on from round to round)")
    server_decay: float = real(1e-2, 0.0, meaning="weight decay of the generator")


class FeatureGenerator(nn.Module):
    """G(eps, y): linear - BatchNorm - ReLU - linear from noise (B, noise_size) and one-hot labels to features (B, p)."""

    def __init__(self, classes: int, size: int, noise_size: int, hidden: int):
        super().__init__()
        self.classes = classes
        self.layers = nn.Sequential(nn.Linear(noise_size + classes, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, size))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """(B, noise_size), (B,) -> (B, p)."""
        wished = labels.unsqueeze(1) == torch.arange(self.classes, device=labels.device)
        return self.layers(torch.cat([noise, wished.to(noise.dtype)], 1))


def client_loss(modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """CE(f(x), y) + alpha CE(h(z'), y') + beta KL(h(z) || f(x)), z' = G(eps', y') of any class, z = G(eps, y) of the image's; h(z) is no variable."""
    logits, head = modules.model(batch["x"]), modules.model.head
    generated = F.cross_entropy(head(batch["z_wished"]), batch["wished"])
    teacher = head(batch["z"]).detach().log_softmax(1)                                      # (B, C)
    known = context["has"][batch["y"]]
    latent = (known * (teacher.exp() * (teacher - logits.log_softmax(1))).sum(1)).mean()
    loss = F.cross_entropy(logits, batch["y"]) + context["alpha"] * generated + context["beta"] * latent
    return loss, {"generated": generated, "latent": latent}


def diversity_loss(noise: Tensor, z: Tensor) -> Tensor:
    """exp(-mean_ij |eps_i - eps_j|^2 |z_i - z_j|), distances as means over components, squared of the noise and absolute of the features."""
    noise_apart = (noise.unsqueeze(1) - noise).square().mean(2)                             # (B, B)
    return (-(noise_apart * (z.unsqueeze(1) - z).abs().mean(2)).mean()).exp()


class FedGen(SharedHead):
    """The server's state: the head, "generator/..." and its "optimizer/...", "has" (C,): of which classes anybody ever had images."""

    config: Config

    def found(self, site: ServerSite) -> Tree:
        with self.problem.stream("init/generator").seeding():
            generator = self.generator()
        return super().found(site) | tree.join(generator=generator.state_dict()) | {"has": torch.zeros(self.problem.classes, dtype=torch.uint8)}

    def generator(self) -> FeatureGenerator:
        """A newly initialised generator."""
        return FeatureGenerator(self.problem.classes, self.problem.common_feature_size(), self.config.noise_size, self.config.hidden)

    def publish(self, server: Tree) -> Tree:
        """The head, and the generator once it has learned something."""
        generator = {path: leaf for path, leaf in server.items() if path.startswith("generator/") and leaf.is_floating_point()}
        return take_head(server) | {"has": server["has"]} | (generator if bool(server["has"].any()) else {})

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        group = self.adopt(group, message)
        if bool(message["has"].any()):
            group, metrics = self.train_with(message, group, site)
        else:
            group, metrics = site.train_model(group, cross_entropy)
        uploads = {}
        for client, own in group.states().items():
            counts = torch.bincount(site.holdings[client].train.labels, minlength=self.problem.classes)
            uploads[client] = take_head(tree.part(own, "model")) | {"counts": counts}
        return Update(group, Uplink({"heads": Uploads(uploads)}), metrics)

    def train_with(self, message: Tree, group: Group, site: ClientSite) -> tuple[Group, Tree]:
        """Local training with a generator that has learned something."""
        config, training, augmentation, device = self.config, self.problem.job.training, self.problem.augmentation(), self.problem.device
        with self.problem.stream("structure").seeding():
            generator = self.generator().to(device)
        draw = bind(generator, generator.state_dict() | tree.to(tree.part(message, "generator"), device))
        has = message["has"].bool().to(device)
        there = has.nonzero().flatten()
        weights = {name: torch.tensor(getattr(config, name) * config.decay ** site.round, device=device) for name in ("alpha", "beta")}

        def batches(client: int) -> Iterator[Tree]:
            random = site.stream("generator", client).torch(device)
            for batch in site.epochs(client, training.epochs, training.batch, augmentation):
                wished = draw_labels(there, config.per_batch, random)
                yield batch | {"wished": wished, "z_wished": draw(self.noise(len(wished), random), wished),
                               "z": draw(self.noise(len(batch["y"]), random), batch["y"])}
        return site.fit(group, [Turn(("model",), client_loss, self.problem.optimizer())], batches, context=weights | {"has": has}, steps=site.steps(group))

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        """The mean head, weighted by images, and the generator after another `server_steps`."""
        uploads = [tree.to(upload, self.problem.device) for _, upload in sorted(totals["heads"].trees.items())]
        counts = torch.stack([upload["counts"] for upload in uploads])                      # (K, C)
        share = counts.sum(1) / counts.sum()
        heads = {path: torch.stack([upload[path] for upload in uploads]) for path in HEAD}
        head = {path: torch.tensordot(share.double(), leaf.double(), 1).to(leaf.dtype) for path, leaf in heads.items()}
        has = server["has"].to(counts.device) | (counts.sum(0) > 0).to(torch.uint8)
        return head | self.train_generator(server, heads, counts, site) | {"has": has}

    def train_generator(self, server: Tree, heads: Tree, counts: Tensor, site: ServerSite) -> Tree:
        """min over G of the teachers' loss + diversity; classes are drawn evenly from those that this round's clients have."""
        config, device = self.config, self.problem.device
        with self.problem.stream("structure").seeding():
            generator = self.generator().to(device)

        there = counts.sum(0).nonzero().flatten()

        def batches(row: int) -> Iterator[Tree]:
            random = site.stream("generator").torch(device)
            for _ in range(config.server_steps):
                yield {"y": draw_labels(there, config.server_batch, random), "noise": self.noise(config.server_batch, random)}
        state = {path: leaf for path, leaf in server.items() if path.startswith(("generator/", f"{OPTIMIZER}/"))}
        group = Group("generator", (0,), tree.repeat(tree.to(state, device), 1))
        rule = self.rule("adam", "server_lr", config.server_lr * config.decay ** site.round, weight_decay=config.server_decay)
        context = {"weight": heads["head.weight"], "bias": heads["head.bias"], "share": counts / counts.sum(0).clamp(min=1)}
        turn, steps = Turn(("generator",), self.generator_loss, rule), config.server_steps * self.problem.job.federation.rounds
        group, metrics = site.fit(group, {"generator": generator}, [turn], batches, context=context, keep_optimizer=True, steps=steps,
                                  member="the generator")
        for name in ("teacher", "diversity"):
            site.note(f"generator_{name}", float(metrics[name]))
        return tree.clone(tree.row(group.state, 0))

    def generator_loss(self, modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
        """What the heads make of G(eps, y), and how alike its features are."""
        z = modules.generator(batch["noise"], batch["y"])                                   # (B, p)
        logits = torch.einsum("bp,kcp->kbc", z, context["weight"]) + context["bias"].unsqueeze(1)
        teacher, alike = TEACHERS[self.config.teacher](logits, batch["y"], context["share"]), diversity_loss(batch["noise"], z)
        return teacher + self.config.diversity * alike, {"teacher": teacher, "diversity": alike}

    def noise(self, count: int, random: torch.Generator) -> Tensor:
        """eps, (count, noise_size)."""
        return NOISES[self.config.noise](count, self.config.noise_size, generator=random, device=self.problem.device)


def draw_labels(there: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Labels (count,) drawn evenly from the classes that there are."""
    return there[torch.randint(len(there), (count,), generator=random, device=there.device)]


def plan(config: Config, problem: Problem) -> Plan:
    """One phase of federation.rounds rounds.

    Raises: JobError for images that are mixed: the loss needs the class of each.
    """
    problem.augmentation()
    return (Phase("rounds", problem.job.federation.rounds, (FedGen(config, problem),)),)
