"""Standalone: every client trains on its own images and nothing is exchanged; the floor of every comparison."""
from dataclasses import dataclass

from hpcfl.contract import Algorithm, ClientSite, Group, Update, plan_rounds
from hpcfl.training.losses import cross_entropy
from hpcfl.tree import Tree


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


class Standalone(Algorithm):
    """Local training, round after round."""

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        group, metrics = site.train_model(group, cross_entropy)
        return Update(group, metrics=metrics)


plan = plan_rounds(Standalone)
