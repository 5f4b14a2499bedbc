"""FedTGP (Zhang et al., AAAI 2024, arXiv 2401.03230): FedProto whose global prototypes are trained at the server instead of averaged.

One round: (1) clients train with FedProto's loss and send the mean feature of each class they have; (2) the server trains a prototype for each class,
made from an embedding by two linear layers, so that clients' prototypes lie nearer to their own class's than to any other by a margin; (3) it sends
the trained prototypes. Clients classify by their own heads here, as for FedProto; the authors' evaluation takes the nearest prototype.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.algorithms.fedproto import loss
from hpcfl.algorithms.prototypes import describe_classes, gather_prototypes
from hpcfl.contract import Algorithm, ClientSite, Phase, Plan, Problem, ServerSite, Totals, Update, choice, integer, real
from hpcfl.training.evaluate import bind
from hpcfl.training.group import Group
from hpcfl.training.optimizers import Optimizer
from hpcfl.training.turns import Turn
from hpcfl.tree import Tree

TINY = 1e-12                                                       # added to squared distances: the root has no slope at 0


@dataclass(frozen=True)
class Config:
    strength: float = real(1.0, 0.0, meaning="weight of the distance to the prototypes, lambda; the published command has 10")
    margin: str = choice("nearest", "furthest", meaning="nearest: the largest of all classes' distances to the nearest other one, as in the published code; "
                                                        "furthest: the largest between any two, as in the paper's formula")
    margin_limit: float = real(100.0, 0.0, meaning="bound on the margin, tau")
    server_epochs: int = integer(100, 1, meaning="passes over the clients' prototypes, S; the published code's default is 1000")
    server_batch: int = integer(10, 1, meaning="batch size at the server, the published command's", unit="prototypes")
    server_lr: float = real(0.0, 0.0, meaning="learning rate at the server (SGD); 0: training.lr, as in the published code")


class GlobalPrototypes(nn.Module):
    """A prototype for each class, (C, p): embedding - linear - ReLU - linear, all of width p as in the published code."""

    def __init__(self, classes: int, size: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(classes, size))
        self.layers = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))

    def forward(self) -> Tensor:
        return self.layers(self.embedding)


def contrastive_loss(modules, batch: Tree, context: Tree) -> Tensor:
    """-log exp(-d_y - delta) / (exp(-d_y - delta) + sum_{c != y} exp(-d_c)), d_c from a client's prototype to the global one of class c."""
    apart = batch["z"].unsqueeze(1) - modules.prototypes()                                  # (B, C, p)
    distances = (apart.square().sum(2) + TINY).sqrt()
    own = batch["y"].unsqueeze(1) == torch.arange(distances.shape[1], device=distances.device)
    return F.cross_entropy(-(distances + own * context["margin"]), batch["y"])


def compute_margin(means: Tensor, classes: Tensor, rule: str, limit: float) -> Tensor:
    """delta = min(the margin between classes, limit), (), from clients' prototypes (n, p) of the classes (n,); 0 for a single class.

    A class lies at the unweighted mean of its prototypes.
    """
    centres = torch.stack([means[classes == label].mean(0) for label in classes.unique()])                         # (C', p)
    distances = torch.linalg.vector_norm(centres.unsqueeze(1) - centres, dim=2)
    if rule == "furthest":
        return distances.max().clamp(max=limit)
    alone = torch.eye(len(centres), dtype=torch.bool, device=centres.device)
    nearest = distances.masked_fill(alone, torch.inf).amin(1)                               # (C',)
    return nearest.masked_fill(nearest.isinf(), 0.0).max().clamp(max=limit)


class FedTGP(Algorithm):
    """The server's state: "network/..." makes the prototypes, "prototypes" (C, p) are what it made, "has" (C,) tells which classes were ever sent."""

    config: Config

    def found(self, site: ServerSite) -> Tree:
        with self.problem.stream("init/prototypes").seeding():
            network = self.network()
        has = torch.zeros(self.problem.classes, dtype=torch.uint8)
        return tree.join(network=network.state_dict()) | {"prototypes": network().detach(), "has": has}

    def network(self) -> GlobalPrototypes:
        """A newly initialised network."""
        return GlobalPrototypes(self.problem.classes, self.problem.common_feature_size())

    def publish(self, server: Tree) -> Tree:
        return {"prototypes": server["prototypes"], "has": server["has"]}

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        """CE + lambda * mean_j (z_j - P^y_j)^2."""
        prototypes, has = (message[name].to(self.problem.device) for name in ("prototypes", "has"))
        context = {"prototypes": prototypes, "has": has.bool(), "weight": torch.ones_like(prototypes[0]),
                   "strength": torch.tensor(self.config.strength, device=prototypes.device)}
        group, metrics = site.train_model(group, loss, context)
        return Update(group, describe_classes(group, site), metrics)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        config, (means, classes) = self.config, gather_prototypes(totals, self.problem.device)

        def batches(row: int) -> Iterator[Tree]:
            generator = site.stream("prototypes").torch()
            for _ in range(config.server_epochs):
                for chosen in torch.randperm(len(classes), generator=generator).to(classes.device).split(config.server_batch):
                    yield {"z": means[chosen], "y": classes[chosen]}
        with site.problem.stream("structure").seeding():
            network = self.network().to(self.problem.device)
        group = Group("prototypes", (0,), tree.repeat(tree.to(tree.join(prototypes=tree.part(server, "network")), self.problem.device), 1))
        own = self.problem.optimizer()
        rule = self.rule("sgd", "server_lr") if config.server_lr else Optimizer("sgd", own.lr, rate_setting=own.rate_setting)
        turn = Turn(("prototypes",), contrastive_loss, rule)
        delta = compute_margin(means, classes, config.margin, config.margin_limit)
        steps = config.server_epochs * -(-len(classes) // config.server_batch) * self.problem.job.federation.rounds
        group, metrics = site.fit(group, {"prototypes": network}, [turn], batches, context={"margin": delta}, steps=steps, work="global prototypes",
                                  member="the network")
        site.note("margin", float(delta))
        site.note("contrastive_loss", float(metrics["loss"]))
        trained = tree.clone(tree.row(group.part("prototypes"), 0))
        has = server["has"].to(classes.device) | (torch.bincount(classes, minlength=self.problem.classes) > 0).to(torch.uint8)
        return tree.join(network=trained) | {"prototypes": bind(network, trained)(), "has": has}


def plan(config: Config, problem: Problem) -> Plan:
    """One phase of federation.rounds rounds.

    Raises: JobError for images that are mixed: the loss needs the class of each.
    """
    problem.augmentation()
    return (Phase("rounds", problem.job.federation.rounds, (FedTGP(config, problem),)),)
