"""FedAvg (McMahan et al., AISTATS 2017) within each architecture: clients whose models have the same shapes average them, weighted by n_k."""
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hpcfl import tree
from hpcfl.contract import Algorithm, ClientSite, Group, ServerSite, Sums, Totals, Update, Uplink, plan_rounds
from hpcfl.training.losses import cross_entropy
from hpcfl.tree import Tree


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


class FedAvg(Algorithm):
    """theta_m <- sum_k n_k theta_k / sum_k n_k over the clients k of architecture m; integer buffers are carried."""

    refines = "adopt"

    def found(self, site: ServerSite) -> Tree:
        models = {}
        for architecture in self.problem.sizes.every:
            with self.problem.stream(f"init/{architecture}").seeding():
                models[architecture] = self.problem.model(architecture).state_dict()
        return tree.join(**models)

    def publish(self, server: Tree) -> Tree:
        return server

    def global_models(self, message: Tree) -> Mapping[str, tuple[str, Tree]]:
        return {architecture: (architecture, tree.part(message, architecture)) for architecture in self.problem.sizes.every}

    def averages(self, architecture: str) -> tuple[str, ...]:
        return (architecture,)

    def receive(self, message: Tree, architecture: str) -> Tree:
        return tree.part(message, architecture)

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        group, metrics = self.learn(self.adopt(group, message), message, site)
        return Update(group, self.upload(group, site), metrics)

    def learn(self, group: Group, message: Tree, site: ClientSite) -> tuple[Group, dict[str, Tensor]]:
        """The local training of clients that begin with what they received."""
        return site.train_model(group, cross_entropy)

    def upload(self, group: Group, site: ClientSite) -> Uplink:
        """What goes up: the models, weighted by n_k."""
        model = tree.select_floating(group.part("model"))
        return Uplink({group.architecture: Sums.weighted(group.clients, model, site.sizes(group))})

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        return average_parts(server, totals)

    def refine(self, group: Group, message: Tree, site: ClientSite) -> Update:
        """The cohort goes on with the average: evaluated before it are the local models, at the end of a round the models that clients hold."""
        return Update(self.adopt(group, message))

    def adopt(self, group: Group, message: Tree) -> Group:
        """The group with the global model."""
        return group.with_common_part("model", tree.to(message, self.problem.device))


def average_parts(server: Tree, totals: Totals) -> Tree:
    """The server's state with the mean of each part that clients sent; leaves keep their type, and what nobody sent stays as it is."""
    means = tree.join(**{name: total.mean() for name, total in totals.items()})
    return {path: means[path].to(leaf.dtype) if path in means else leaf for path, leaf in server.items()}


plan = plan_rounds(FedAvg)
