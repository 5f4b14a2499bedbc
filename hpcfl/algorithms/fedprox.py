"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127) within each architecture: FedAvg whose clients are held near the model that they received."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcfl import tree
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.contract import ClientSite, Phase, Plan, Problem, choice_of, real
from hpcfl.training.group import Group
from hpcfl.tree import Tree

NORMS = {"squared": lambda apart: sum(each.square().sum() for each in apart),                   # ||w - w^t||^2
         "code": lambda apart: sum(torch.linalg.vector_norm(each) for each in apart)}          # sum over tensors i of ||w_i - w_i^t||


@dataclass(frozen=True)
class Config:
    mu: float = real(0.01, 0.0, meaning="weight of the proximal term; GeFL's; Li et al. try 0.001 to 1")
    norm: str = choice_of(NORMS, "squared", meaning="the proximal term; squared: as Li et al.; code: as the published code of GeFL")


class FedProx(FedAvg):
    """h(w; w^t) = CE(w) + mu / 2 * ||w - w^t||^2 (the paper's equation 2) over all parameters, w^t what the client received this round."""

    config: Config

    def learn(self, group: Group, message: Tree, site: ClientSite) -> tuple[Group, dict[str, Tensor]]:
        return site.train_model(group, self.loss, tree.to(message, self.problem.device))

    def loss(self, modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
        """The objective h of one client; `context` is w^t, by parameter."""
        proximal = NORMS[self.config.norm]([parameter - context[path] for path, parameter in modules.model.named_parameters()])
        return F.cross_entropy(modules.model(batch["x"]), batch["y"]) + self.config.mu / 2 * proximal, {"proximal": proximal}


def plan(config: Config, problem: Problem) -> Plan:
    """One phase of federation.rounds rounds.

    Raises: JobError for images that are mixed: the loss needs the class of each.
    """
    problem.augmentation()
    return (Phase("rounds", problem.job.federation.rounds, (FedProx(config, problem),)),)
