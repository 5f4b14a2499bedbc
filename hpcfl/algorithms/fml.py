"""FML (Shen et al., Federated Mutual Learning, arXiv 2006.16765): a private model and a small common "meme" model teach each other at every client.

Only memes travel: they are averaged by FedAvg over all clients, while the private models, of any architecture, stay where they are.
"""
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.contract import Algorithm, ClientSite, JobError, Phase, Plan, Problem, ServerSite, Sums, Uplink, name_of, real
from hpcfl.models import zoo
from hpcfl.training.group import Group
from hpcfl.training.losses import divergence
from hpcfl.training.turns import Turn
from hpcfl.tree import Tree

MEME = "meme"


@dataclass(frozen=True)
class Config:
    alpha: float = real(0.5, 0.0, 1.0, meaning="weight of the private model's cross-entropy; the authors' code")
    beta: float = real(0.5, 0.0, 1.0, meaning="weight of the meme's cross-entropy; the authors' code")
    meme: str = name_of(zoo.ENTRIES, "cnn4", besides="any of them narrower, as cnn4@0.75", meaning="the small common model; ours: the smallest of GeFL's ten")


class FML(FedAvg):
    """L_private = alpha CE + (1 - alpha) KL(p_meme || p_private) and L_meme = beta CE + (1 - beta) KL(p_private || p_meme), both of one forward pass.

    The teacher of each is a constant to it, so that one step on the sum of both is a step of each on its own loss; training.clip bounds the
    gradient of both together.
    """

    config: Config
    refine = Algorithm.refine                                      # memes are for training alone: the next round's is early enough

    def modules(self, architecture: str) -> dict[str, nn.Module]:
        return {**super().modules(architecture), MEME: self.problem.model(self.config.meme)}

    def join(self, group: Group, site: ClientSite) -> Group:
        group = super().join(group, site)
        return group if group.part(MEME) else group.with_common_part(MEME, self.first())

    def found(self, site: ServerSite) -> Tree:
        return tree.join(**{MEME: self.first()})

    def first(self) -> Tree:
        """The meme before the first round."""
        with self.problem.stream(f"init/{MEME}").seeding():
            return self.problem.model(self.config.meme).state_dict()

    def global_models(self, message: Tree) -> Mapping[str, tuple[str, Tree]]:
        return {MEME: (self.config.meme, tree.part(message, MEME))}

    def averages(self, architecture: str) -> tuple[str, ...]:
        return (MEME,)

    def receive(self, message: Tree, architecture: str) -> Tree:
        return tree.part(message, MEME)

    def learn(self, group: Group, message: Tree, site: ClientSite) -> tuple[Group, dict[str, Tensor]]:
        training, augmentation = self.problem.job.training, self.problem.augmentation()
        return site.fit(group, [Turn(("model", MEME), self.loss, self.problem.optimizer())],
                        lambda client: site.epochs(client, training.epochs, training.batch, augmentation), steps=site.steps(group))

    def upload(self, group: Group, site: ClientSite) -> Uplink:
        return Uplink({MEME: Sums.weighted(group.clients, tree.select_floating(group.part(MEME)), site.sizes(group))})

    def loss(self, modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
        """L_private + L_meme of one client."""
        alpha, beta = self.config.alpha, self.config.beta
        private, meme = modules.model(batch["x"]).log_softmax(1), modules.meme(batch["x"]).log_softmax(1)                    # (B, C)
        own = alpha * F.nll_loss(private, batch["y"]) + (1 - alpha) * divergence(meme.detach(), private)
        common = beta * F.nll_loss(meme, batch["y"]) + (1 - beta) * divergence(private.detach(), meme)
        return own + common, {"private_loss": own, "meme_loss": common}

    def adopt(self, group: Group, message: Tree) -> Group:
        return group.with_common_part(MEME, tree.to(message, self.problem.device))


def plan(config: Config, problem: Problem) -> Plan:
    """One phase of federation.rounds rounds.

    Raises: JobError for a meme that is not in the zoo, and for images that are mixed: the loss needs the class of each.
    """
    problem.augmentation()
    try:
        zoo.find_entry(config.meme)
    except JobError as error:
        raise JobError(f"algorithm.meme: {error}") from error
    return (Phase("rounds", problem.job.federation.rounds, (FML(config, problem),)),)
