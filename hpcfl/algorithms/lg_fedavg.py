"""LG-FedAvg (Liang et al., arXiv 2001.01523): one part of the models is averaged over all clients, whatever their architecture.

Liang et al. share the head and keep the representations at the clients: shared = "head", rest = "personal". GeFL's baseline of that name
(specification, section 6) shares the common extractor and averages what follows it within each architecture: shared = "features",
rest = "architecture". Local and shared parts are trained together.
"""
from collections.abc import Mapping
from dataclasses import dataclass

from hpcfl import tree
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.contract import ClientSite, JobError, Phase, Plan, Problem, ServerSite, Sums, Uplink, choice
from hpcfl.training.group import Group
from hpcfl.tree import Tree

COMMON = "common"                                                  # what all clients share, beside the architectures in the server's state
SHARED = {"features": "extractor.", "head": "head."}               # leaves of a Model that are shared


@dataclass(frozen=True)
class Config:
    shared: str = choice("features", "head")                       # GeFL's choice, or that of Liang et al.
    rest: str = choice("architecture", "personal")                 # where the rest is averaged: within each architecture, or nowhere


class LgFedAvg(FedAvg):
    """theta^c <- sum_k n_k theta^c_k / sum_k n_k over all clients; the same of the rest over the clients of each architecture, or the rest stays."""

    config: Config

    def __init__(self, config: Config, problem: Problem):
        super().__init__(config, problem)
        first, *others = problem.sizes.every
        for name in (first, *others):
            got, wanted = self.shapes(name), self.shapes(first)
            if got != wanted or not got:
                raise JobError(f"{self.problem.job.algorithm_name} averages '{SHARED[config.shared]}*' over all clients, but of '{name}' "
                               f"that is {got or 'empty'} and of "
                               f"'{first}' {wanted or 'empty'}; wanted models with one common extractor, for example cnn1 to cnn10, or "
                               "algorithm.shared = 'head' with models.feature_size above 0")

    def shapes(self, architecture: str) -> dict[str, tuple[int, ...]]:
        """The shapes of an architecture's shared leaves."""
        return {path: tuple(leaf.shape) for path, leaf in self.take_common(self.problem.structure(architecture).state_dict()).items()}

    def take_common(self, model: Tree) -> Tree:
        """The shared leaves of a model."""
        return {path: leaf for path, leaf in model.items() if path.startswith(SHARED[self.config.shared])}

    def take_others(self, model: Tree) -> Tree:
        """The other leaves as far as they are averaged at all."""
        shared = self.take_common(model)
        return {path: leaf for path, leaf in model.items() if path not in shared} if self.config.rest == "architecture" else {}

    def found(self, site: ServerSite) -> Tree:
        models, every = super().found(site), self.problem.sizes.every
        return tree.join(**{COMMON: self.take_common(tree.part(models, every[0]))}, **{name: self.take_others(tree.part(models, name)) for name in every})

    def global_models(self, message: Tree) -> Mapping[str, tuple[str, Tree]]:
        whole = self.problem.sizes.every if self.config.rest == "architecture" else ()
        return {name: (name, self.model(message, name)) for name in whole}

    def averages(self, architecture: str) -> tuple[str, ...]:
        return (COMMON, architecture) if self.config.rest == "architecture" else (COMMON,)

    def receive(self, message: Tree, architecture: str) -> Tree:
        return self.model(message, architecture)

    def model(self, message: Tree, architecture: str) -> Tree:
        """What a message says of one architecture's model."""
        return tree.part(message, COMMON) | tree.part(message, architecture)

    def upload(self, group: Group, site: ClientSite) -> Uplink:
        model, sizes = tree.select_floating(group.part("model")), site.sizes(group)
        parts = {COMMON: Sums.weighted(group.clients, self.take_common(model), sizes)}
        if own := self.take_others(model):
            parts[group.architecture] = Sums.weighted(group.clients, own, sizes, weights_sent=False)         # n_k goes up once
        return Uplink(parts)

    def adopt(self, group: Group, message: Tree) -> Group:
        """The group with what it received in place of its own."""
        received = tree.repeat(tree.to(message, self.problem.device), len(group.clients))
        return group.with_part("model", group.part("model") | received)


def plan(config: Config, problem: Problem) -> Plan:
    """One phase of federation.rounds rounds."""
    return (Phase("rounds", problem.job.federation.rounds, (LgFedAvg(config, problem),)),)
