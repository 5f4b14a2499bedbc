"""FedProto (Tan et al., AAAI 2022): clients exchange class prototypes, the mean features of their classes, and keep their models to themselves."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcfl.contract import Algorithm, ClientSite, Phase, Plan, Problem, ServerSite, Sums, Totals, Update, Uplink, real
from hpcfl.latents.moments import measure
from hpcfl.training.group import Group
from hpcfl.training.losses import prototype_distance
from hpcfl.tree import Tree


@dataclass(frozen=True)
class Config:
    strength: float = real(1.0, 0.0, meaning="weight of the distance to the global prototypes, lambda of the paper")


def loss(modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """CE + lambda * mean_j (z_j - c^y_j)^2 (the paper's equation 7)."""
    z = modules.model.features(batch["x"])                                                  # (B, p)
    distance = prototype_distance(z, batch["y"], context["prototypes"], context["has"], context["weight"])
    return F.cross_entropy(modules.model.head(z), batch["y"]) + context["strength"] * distance, {"alignment": distance}


class FedProto(Algorithm):
    """c^y <- sum_k n_k^y c_k^y / sum_k n_k^y; classes that nobody held this round keep their prototype."""

    def found(self, site: ServerSite) -> Tree:
        size = self.problem.common_feature_size()
        return {"prototypes": torch.zeros(self.problem.classes, size), "has": torch.zeros(self.problem.classes, dtype=torch.uint8)}

    def publish(self, server: Tree) -> Tree:
        return server

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        prototypes = message["prototypes"].to(site.problem.device)
        context = {"prototypes": prototypes, "has": message["has"].bool().to(prototypes.device), "weight": torch.ones_like(prototypes[0]),
                   "strength": torch.tensor(self.config.strength, device=prototypes.device)}
        group, metrics = site.train_model(group, loss, context)
        moments = [measure(site.features(group, client), site.holdings[client].train.labels, self.problem.classes, full=False) for client in group.clients]
        means = {"prototypes": torch.stack([m.mean for m in moments]).float()}              # (K, C, p)
        counts = {"prototypes": torch.stack([m.count for m in moments]).unsqueeze(2)}       # (K, C, 1)
        return Update(group, Uplink({"prototypes": Sums.weighted(group.clients, means, counts)}), metrics)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        total = totals["prototypes"]
        held = total.counts["prototypes"] > 0                                               # (C, 1)
        return {"prototypes": torch.where(held, total.mean()["prototypes"].float(), server["prototypes"]),
                "has": (server["has"].bool() | held.squeeze(1)).to(torch.uint8)}


def plan(config: Config, problem: Problem) -> Plan:
    """One phase of federation.rounds rounds.

    Raises: JobError for images that are mixed: the loss needs the class of each.
    """
    problem.augmentation()
    return (Phase("rounds", problem.job.federation.rounds, (FedProto(config, problem),)),)
