"""AvgKD (Afonin and Karimireddy, ICLR 2022, arXiv 2110.15210): clients learn from their labels averaged with the predictions of all other models.

For many clients of few architectures as GeFL has it (specification, section 6): models are averaged within each architecture, and a client is taught
by those of the other architectures.
"""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcfl import tree
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.contract import ClientSite, Phase, Plan, Problem, ServerSite, Totals, choice
from hpcfl.data.shards import Shard
from hpcfl.training.evaluate import apply_in_batches, bind
from hpcfl.training.group import Group
from hpcfl.training.turns import Turn
from hpcfl.tree import Tree

TRAINED = "trained"                                                # beside the architectures in the server's state: which of them have been trained


@dataclass(frozen=True)
class Config:
    target: str = choice("softmax", "mean", meaning="what a client learns: the softmax of the sum of label and predictions (GeFL), or their mean (the paper)")


def soft_cross_entropy(modules, batch: Tree, context: Tree) -> Tensor:
    """-sum_c q_c log softmax(f(x))_c, mean over the batch."""
    return -(batch["target"] * modules.model(batch["x"]).log_softmax(1)).sum(1).mean()


class AvgKD(FedAvg):
    """q = softmax(onehot(y) + sum_m softmax(f_m(x))) over the trained architectures m other than the client's own, once a round; then FedAvg.

    While no other architecture has been trained, as in the first round, clients train on their labels alone.
    """

    config: Config

    def found(self, site: ServerSite) -> Tree:
        return super().found(site) | tree.join(**{TRAINED: {name: torch.zeros((), dtype=torch.uint8) for name in self.problem.sizes.every}})

    def receive(self, message: Tree, architecture: str) -> Tree:
        """The client's own model and those of all that can teach it: the downlink counts every one of them."""
        wanted = [name for name in self.problem.sizes.every if name == architecture or bool(message[f"{TRAINED}/{name}"])]
        return tree.join(**{name: tree.part(message, name) for name in wanted})

    def learn(self, group: Group, message: Tree, site: ClientSite) -> tuple[Group, dict[str, Tensor]]:
        others = [name for name in self.problem.sizes.every if name != group.architecture and tree.part(message, name)]
        if not others:
            return super().learn(group, message, site)
        teachers = [bind(self.problem.structure(name), tree.to(tree.part(message, name), self.problem.device)) for name in others]
        targets = {client: self.targets(site.holdings[client].train, teachers) for client in group.clients}
        training, augmentation = self.problem.job.training, self.problem.augmentation()

        def batches(client: int) -> Iterator[Tree]:
            for batch in site.epochs(client, training.epochs, training.batch, augmentation):
                yield {"x": batch["x"], "target": targets[client][batch["index"]]}
        return site.fit(group, [Turn(("model",), soft_cross_entropy, self.problem.optimizer())], batches, steps=site.steps(group))

    def targets(self, shard: Shard, teachers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """q of every image of a shard, (n, C), from the teachers' logits in eval mode."""
        total = F.one_hot(shard.labels, self.problem.classes) + sum(apply_in_batches(teacher, shard).softmax(1) for teacher in teachers)
        return total.softmax(1) if self.config.target == "softmax" else total / (1 + len(teachers))

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        return super().aggregate(server, totals, site) | tree.join(**{TRAINED: {name: torch.ones((), dtype=torch.uint8) for name in totals}})

    def adopt(self, group: Group, message: Tree) -> Group:
        return super().adopt(group, tree.part(message, group.architecture))


def plan(config: Config, problem: Problem) -> Plan:
    """One phase of federation.rounds rounds.

    Raises: JobError for images that are mixed: the loss needs the class of each.
    """
    problem.augmentation()
    return (Phase("rounds", problem.job.federation.rounds, (AvgKD(config, problem),)),)
