"""CCVR (Luo et al., NeurIPS 2021, arXiv 2106.05001): after federated averaging the classifier is trained again, on virtual features.

First FedAvg within each architecture, for all rounds; then once: clients send count, mean and covariance of the features of each class, the server
merges them, draws virtual features from one Gaussian a class, calibrates the head on them, and sends it. Between architectures (ours, scope = "all"):
the head is averaged over all clients in all rounds, which is what gives features of different extractors one meaning, and one head is calibrated on
the statistics of all. With scope = "architecture" every architecture is a CCVR of its own, the paper's.
"""
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcfl import tree
from hpcfl.algorithms import lg_fedavg
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.algorithms.lg_fedavg import COMMON, LgFedAvg
from hpcfl.algorithms.shared_head import HEAD, SharedHead, take_head, train_head
from hpcfl.contract import Algorithm, ClientSite, Group, Phase, Plan, Problem, ServerSite, Totals, Update, Uplink, Uploads, choice, integer, real
from hpcfl.latents import gaussians, moments
from hpcfl.latents.moments import ClassGaussians
from hpcfl.training.synthetic import draw_synthetic_epochs
from hpcfl.tree import Tree


@dataclass(frozen=True)
class Config:
    scope: str = choice("all", "architecture", meaning="whose features share a head")
    covariance: str = choice("class_full", "class_diag", meaning="of a class's features; full: the paper's; diag: for less traffic")
    min_count: int = integer(1, 1, meaning="a class with fewer images is not sent: the mean of one image is that image", unit="images")
    floor: float = real(1e-4, 0.0, above=True, meaning="added to variances: few samples leave directions without any (ours)")
    per_class: int = integer(200, 1, meaning="virtual features of a class, M_c; this and what follows are ours")
    batch: int = integer(64, 1, meaning="batch size of the calibration", unit="virtual features")
    epochs: int = integer(10, 1, meaning="passes of the calibration over one and the same virtual set")
    lr: float = real(0.01, 0.0, above=True, meaning="learning rate of the calibration (SGD)")


class Calibrate(Algorithm):
    """Clients describe their features, and the server calibrates the head on virtual ones:

    Sigma_c = [sum_k (N_ck - 1) Sigma_ck + N_ck (mu_ck - mu_c)(mu_ck - mu_c)^T] / (N_c - 1), z ~ N(mu_c, Sigma_c), head <- argmin CE(head(z), c).
    Features are those of the averaged models; clients get nothing but the new head, by the next step.
    """

    config: Config

    def __init__(self, config: Config, problem: Problem, average: FedAvg):
        super().__init__(config, problem)
        self.average = average                                     # the step that made the models

    def publish(self, server: Tree) -> Tree:
        return self.average.publish(server)

    def global_models(self, message: Tree) -> Mapping[str, tuple[str, Tree]]:
        return self.average.global_models(message)

    def receive(self, message: Tree, architecture: str) -> Tree:
        return self.average.receive(message, architecture)

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        group, full, messages = self.average.adopt(group, message), moments.needs_full(self.config.covariance), {}
        for client in group.clients:
            measured = moments.measure(site.features(group, client), site.holdings[client].train.labels, self.problem.classes, full)
            messages[client] = moments.to_message(measured, self.config.covariance, self.config.min_count)
        return Update(group, Uplink({locate_head(self.config, group.architecture): Uploads(messages)}))

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        for where, uploads in sorted(totals.items()):
            estimate = moments.aggregate([upload for _, upload in sorted(uploads.trees.items())], self.config.covariance)
            if bool(estimate.has.any()):
                server = server | tree.join(**{where: self.calibrate(take_head(tree.part(server, where)), estimate, where, site)})
        return server

    def calibrate(self, head: Tree, estimate: ClassGaussians, where: str, site: ServerSite) -> Tree:
        """The head, trained on from where it was, on virtual features."""
        config, device = self.config, self.problem.device
        factor = gaussians.compute_factors(unbias_covariances(estimate, config.floor)).to(device)
        mean, classes = estimate.mean.to(device), estimate.has.nonzero().flatten().to(device)

        def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
            eps = torch.randn(len(labels), mean.shape[1], generator=generator, device=device)
            return gaussians.draw(mean, factor, labels, eps)
        stream = site.stream(f"virtual/{where}")
        virtual = draw_synthetic_epochs(draw, classes, config.per_class, config.batch, config.epochs, stream, resample=False)
        return train_head(head, virtual, self.rule("sgd", "lr"), site, f"calibration of {where}")


class TakeHead(SharedHead):
    """The end: every client takes the calibrated head."""

    def found(self, site: ServerSite) -> Tree:
        """Nothing: the heads are those of the models."""
        return {}

    def publish(self, server: Tree) -> Tree:
        return {path: leaf for path, leaf in server.items() if path.partition("/")[2] in HEAD}

    def receive(self, message: Tree, architecture: str) -> Tree:
        return tree.part(message, locate_head(self.config, architecture))


def locate_head(config: Config, architecture: str) -> str:
    """Where in the server's state the head lies that clients of an architecture use."""
    return COMMON if config.scope == "all" else architecture


def unbias_covariances(estimate: ClassGaussians, floor: float) -> Tensor:
    """The unbiased covariances (C, p, p) or variances (C, p), with the floor added; of a class with a single sample the floor alone."""
    unbiased = (estimate.count / (estimate.count - 1).clamp(min=1)).view(-1, *[1] * (estimate.spread.dim() - 1)) * estimate.spread
    return unbiased + floor if unbiased.dim() == 2 else gaussians.floor(unbiased, floor)


def plan(config: Config, problem: Problem) -> Plan:
    """federation.rounds rounds of averaging, then one of calibration with all clients.

    Raises: JobError for scope = "all" where features have no common size.
    """
    if config.scope == "all":
        problem.common_feature_size()
        average: FedAvg = LgFedAvg(lg_fedavg.Config(shared="head", rest="architecture"), problem)
    else:
        average = FedAvg(config, problem)
    return (Phase("rounds", problem.job.federation.rounds, (average,)),
            Phase("calibrate", 1, (Calibrate(config, problem, average), TakeHead(config, problem)), everyone=True))
