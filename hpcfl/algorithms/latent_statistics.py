"""Describing: clients describe their images by counts, means and covariances of latents, and the server makes one Gaussian of each class of them."""
from typing import Protocol

import torch
from torch import Tensor, nn

from hpcfl.contract import Algorithm, ClientSite, Problem, ServerSite, Totals, Update, Uplink, Uploads
from hpcfl.latents import moments
from hpcfl.latents.announced import HEADER, AnnouncedGaussians, announce_gaussians, make_empty
from hpcfl.latents.encoders import LATENTS
from hpcfl.latents.moments import ClassGaussians, Moments
from hpcfl.training.group import Group
from hpcfl.tree import Tree

Latents = dict[int, Tensor]                                        # client -> (n, p), one per training image
LocalMoments = dict[int, Moments]                                         # client -> statistics of its latents


class LatentSettings(Protocol):
    """The settings that describing needs; FedVTC's Config and the Gaussian classifier's have them."""

    @property
    def latent(self) -> str: ...
    @property
    def common_map(self) -> str: ...
    @property
    def common_size(self) -> int: ...
    @property
    def covariance(self) -> str: ...
    @property
    def between_client(self) -> bool: ...
    @property
    def min_count(self) -> int: ...
    @property
    def shrink_target(self) -> str: ...
    @property
    def server_floor(self) -> float: ...


class DescribeLatents(Algorithm):
    """What all methods by statistics of latents share: what goes up, what the server makes of it, and how a client reads what comes down."""

    config: LatentSettings

    def __init__(self, config: LatentSettings, problem: Problem):
        super().__init__(config, problem)
        self.latent = LATENTS[config.latent](config, problem)
        self.full = moments.needs_full(config.covariance)
        self.read: tuple[Tree, AnnouncedGaussians] | None = None   # the last message, and what it says

    def modules(self, architecture: str) -> dict[str, nn.Module]:
        return super().modules(architecture) | self.latent.modules()

    def found(self, site: ServerSite) -> Tree:
        return dict(vars(make_empty(self.problem.classes, self.latent.size, self.config.covariance)))

    def publish(self, server: Tree) -> Tree:
        """has, c^y and the spread as float32 (packed triangles): the down message of FedVTC's specification, 2.5."""
        return announce_gaussians(read_gaussians(server), self.config.covariance, self.config.shrink_target, self.config.server_floor)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        """Merge the clients' moments by the law of total covariance; a server that got none stays as it is."""
        if "moments" not in totals:
            return server
        merged = moments.aggregate(list(totals["moments"].trees.values()), self.config.covariance, between_client=self.config.between_client)
        return server | vars(moments.keep_previous(merged, read_gaussians(server), self.config.covariance))

    def read_gaussians(self, message: Tree) -> AnnouncedGaussians:
        """The global statistics of a message, ready to be drawn from; read once for all groups, verbs and chunks that it comes to."""
        told = {name: message[name] for name in ("has", "mean", "spread")}
        if self.read is None or any(leaf is not self.read[0][name] for name, leaf in told.items()):
            self.read = told, AnnouncedGaussians.from_message(told, self.config.covariance, self.problem.device)
        return self.read[1]

    def encode(self, group: Group, site: ClientSite) -> Latents:
        """Each client's training images as latents, without augmentation and gradients."""
        return {client: self.latent.encode_training(group, site, client) for client in group.clients}

    def measure(self, latents: Latents, site: ClientSite) -> LocalMoments:
        """Counts, means and scatter of each client's latents by class."""
        return {client: moments.measure(z, site.holdings[client].train.labels, self.problem.classes, self.full) for client, z in latents.items()}

    def upload(self, local: LocalMoments) -> Uplink:
        """The up message of each client: header, counts, means, spread (specification, 2.5)."""
        header = {"header": torch.zeros(HEADER, dtype=torch.int32)}
        messages = {client: header | moments.to_message(m, self.config.covariance, self.config.min_count) for client, m in local.items()}
        return Uplink({"moments": Uploads(messages)})

    def sent_samples(self, group: Group, site: ClientSite) -> list[tuple[Tensor, Tensor]]:
        """Each client's latents (n, p) and labels (n,), without the classes that min_count keeps from being sent."""
        samples = []
        for client, z in self.encode(group, site).items():
            y = site.holdings[client].train.labels
            kept = torch.bincount(y, minlength=self.problem.classes)[y] >= self.config.min_count
            samples.append((z[kept], y[kept]))
        return samples


class SendMoments(DescribeLatents):
    """Common latents, once: every client sends counts, means and spread of phi(x), and the server merges them."""

    def publish(self, server: Tree) -> Tree:
        return {}

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        return Update(group, self.upload(self.measure(self.encode(group, site), site)))


def read_gaussians(server: Tree) -> ClassGaussians:
    """The statistics in the server's state."""
    return ClassGaussians(**{name: server[name] for name in ClassGaussians.__dataclass_fields__})
