"""FedGH (Yi et al., ACM MM 2023, arXiv 2303.13137): the server trains one header for all clients on the mean features of each client's classes.

One round: (1) clients replace their header by the global one and train their whole models; (2) they send the mean feature of each class they have,
and its label; (3) the server trains the global header on these pairs. Extractors are as different as they like but end in p features.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hpcfl.algorithms.prototypes import describe_classes, gather_prototypes
from hpcfl.algorithms.shared_head import SharedHead, train_head
from hpcfl.contract import ClientSite, Phase, Plan, Problem, ServerSite, Totals, Update, integer, real
from hpcfl.training.group import Group
from hpcfl.training.losses import cross_entropy
from hpcfl.tree import Tree


@dataclass(frozen=True)
class Config:
    server_lr: float = real(0.01, 0.0, above=True, meaning="learning rate of the head at the server (SGD): that of all training in the published code")
    server_batch: int = integer(1, 1, meaning="pairs in a step: the paper's algorithm takes one at a time, HtFLlib 10", unit="pairs")
    server_epochs: int = integer(1, 1, meaning="passes over the pairs of a round; one in the paper")


class FedGH(SharedHead):
    """theta <- theta - eta grad CE(theta(c_k^y), y) over the mean features c_k^y of each client k and class y.

    The pairs come in a random order (ours): in the paper's, client after client, the last one would always have the last word. In the authors' code
    the step belongs to an optimiser of some client, so that their header stays as it was initialised; here it is trained.
    """

    config: Config

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        group, metrics = site.train_model(self.adopt(group, message), cross_entropy)
        return Update(group, describe_classes(group, site), metrics)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        config, (means, classes) = self.config, gather_prototypes(totals, self.problem.device)

        def batches() -> Iterator[Tree]:
            generator = site.stream("pairs").torch()
            for _ in range(config.server_epochs):
                for chosen in torch.randperm(len(classes), generator=generator).to(classes.device).split(config.server_batch):
                    yield {"x": means[chosen], "y": classes[chosen]}
        return train_head(server, batches(), self.rule("sgd", "server_lr"), site, "global header")


def plan(config: Config, problem: Problem) -> Plan:
    """One phase of federation.rounds rounds."""
    return (Phase("rounds", problem.job.federation.rounds, (FedGH(config, problem),)),)
