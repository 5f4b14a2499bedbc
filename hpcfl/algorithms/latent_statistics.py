"""Statistics of latents: clients send the moments of their latents by class, the server makes one Gaussian of each class of them and announces it.

There are two ways to the same Gaussians: every client's moments go up and the server merges them; or, where the server is to see nothing but sums over
clients, counts and sums go up, the means come down, and the scatter around them goes up.
"""
from typing import Protocol

import torch
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.contract import Algorithm, ClientSite, Group, Problem, ServerSite, Sums, Totals, Update, Uplink, Uploads
from hpcfl.latents import moments
from hpcfl.latents.announced import HEADER, AnnouncedGaussians, announce_gaussians, make_empty
from hpcfl.latents.encoders import LATENTS
from hpcfl.latents.moments import ClassGaussians, Moments
from hpcfl.tree import Tree

Latents = dict[int, Tensor]                                        # client -> (n, p), one per training image
LocalMoments = dict[int, Moments]                                  # client -> moments of its latents


class LatentSettings(Protocol):
    """The settings that describing latents needs; FedVTC's Config and the Gaussian classifier's have them."""

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
    """What all steps that describe latents share: what goes up, what the server makes of it, and how a client reads what comes down.

    The server's state is a `ClassGaussians` as a Tree.
    """

    config: LatentSettings

    def __init__(self, config: LatentSettings, problem: Problem):
        super().__init__(config, problem)
        self.latent = LATENTS[config.latent](config, problem)
        self.full = moments.needs_full(config.covariance)          # whether scatter matrices are measured, or their diagonals

    def modules(self, architecture: str) -> dict[str, nn.Module]:
        return super().modules(architecture) | self.latent.modules()

    def found(self, site: ServerSite) -> Tree:
        return dict(vars(make_empty(self.problem.classes, self.latent.size, self.config.covariance)))

    def publish(self, server: Tree) -> Tree:
        """has, c^y and the spread as float32 (packed triangles): the down message of FedVTC's specification, 2.5."""
        return announce_gaussians(load_gaussians(server), self.config.covariance, self.config.shrink_target, self.config.server_floor)

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        """Merge the clients' moments by the law of total covariance; a server that got none stays as it is."""
        if "moments" not in totals:
            return server
        merged = moments.aggregate(list(totals["moments"].trees.values()), self.config.covariance, between_client=self.config.between_client)
        return server | vars(moments.keep_previous(merged, load_gaussians(server), self.config.covariance))

    def read_gaussians(self, message: Tree, site: ClientSite) -> AnnouncedGaussians:
        """The class Gaussians of a message, ready to be drawn from; read once for all groups, verbs and chunks that it comes to."""
        told = {name: message[name] for name in ("has", "mean", "spread")}
        return site.once_for_all("gaussians", tuple(told.values()),
                                 lambda: AnnouncedGaussians.from_message(told, self.config.covariance, self.problem.device))

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

    def upload_sums(self, group: Group, site: ClientSite) -> Uplink:
        """What each client adds to counts and sums."""
        firsts = [moments.sum_features(z, y, self.problem.classes) for z, y in self.sent_samples(group, site)]
        return Uplink({"first": Sums.weighted(group.clients, tree.stack(firsts), torch.ones(len(group.clients)), weights_sent=False)})

    def sent_samples(self, group: Group, site: ClientSite) -> list[tuple[Tensor, Tensor]]:
        """Each client's latents (n, p) and labels (n,), without the classes that min_count keeps from being sent."""
        samples = []
        for client, z in self.encode(group, site).items():
            y = site.holdings[client].train.labels
            kept = torch.bincount(y, minlength=self.problem.classes)[y] >= self.config.min_count
            samples.append((z[kept], y[kept]))
        return samples


class SendMoments(DescribeLatents):
    """All in one phase: every client sends counts, means and spread, and the server merges them."""

    def publish(self, server: Tree) -> Tree:
        return {}

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        return Update(group, self.upload(self.measure(self.encode(group, site), site)))


class SendMeans(DescribeLatents):
    """The first of two phases of sums (FedVTC's specification, 8.4): counts and sums go up, from which the global means follow.

    The server's state keeps them as "first/..." until the second phase has come.
    """

    def publish(self, server: Tree) -> Tree:
        return {}

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        return Update(group, self.upload_sums(group, site))

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        return take_means(server, totals)


class SendScatter(DescribeLatents):
    """The second phase of sums: the scatter around the global means goes up."""

    def publish(self, server: Tree) -> Tree:
        """The new means alone: the spread is still the old one, and all else goes with what comes of this phase."""
        return {"mean": server["mean"].float()}

    def train(self, group: Group, message: Tree, site: ClientSite) -> Update:
        mean, mode = message["mean"].double().to(self.problem.device), self.config.covariance
        around = [moments.measure_scatter(z, y, mean, mode) for z, y in self.sent_samples(group, site)]
        sums = Sums.weighted(group.clients, {"scatter": torch.stack(around)}, torch.ones(len(group.clients)), weights_sent=False)
        return Update(group, Uplink({"scatter": sums}))

    def aggregate(self, server: Tree, totals: Totals, site: ServerSite) -> Tree:
        first, mode = tree.part(server, "first"), self.config.covariance
        merged = moments.from_sums(first["counts"], first["sums"], totals["scatter"].values["scatter"], mode)
        kept = {path: leaf for path, leaf in server.items() if not path.startswith("first/")}
        return kept | vars(moments.keep_previous(merged, load_gaussians(server), mode))


def take_means(server: Tree, totals: Totals) -> Tree:
    """The server's state with the means that follow from counts and sums; classes without a sample keep their mean."""
    first = totals["first"].values
    mean = torch.where(first["counts"][:, None] > 0, first["sums"] / first["counts"].clamp(min=1)[:, None], server["mean"])
    return {**server, "mean": mean, **tree.join(first=first)}


def load_gaussians(server: Tree) -> ClassGaussians:
    """The class Gaussians in the server's state."""
    return ClassGaussians(**{name: server[name] for name in ClassGaussians.__dataclass_fields__})
