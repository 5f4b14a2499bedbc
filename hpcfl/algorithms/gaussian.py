"""Gaussian: the closed-form classifier (quadratic discriminant) that FedVTC's uploaded statistics give without any training; its honest yardstick."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcfl import tree
from hpcfl.algorithms import latent_statistics
from hpcfl.algorithms.latent_statistics import DescribeLatents
from hpcfl.contract import ClientSite, Group, Phase, Plan, Problem, Update, choice, choice_of, flag, integer, real
from hpcfl.data.shards import Scale
from hpcfl.latents.gaussians import TARGETS
from hpcfl.latents.moments import MODES
from hpcfl.models.fixed_maps import MAPS
from hpcfl.tree import Tree


@dataclass(frozen=True)
class Config:
    latent: str = choice("common", meaning="the space of the Gaussians; the classifier needs one for all")
    common_map: str = choice_of(MAPS, "dct", meaning="which fixed map, as for fedvtc")
    common_size: int = integer(64, 2, meaning="number of features p of the map")
    covariance: str = choice_of(MODES, "class_full", meaning="which covariance: of each class or shared by all; all of it, its diagonal, or one number")
    between_client: bool = flag(True, meaning="whether the spread of the clients' means belongs to the covariance")
    min_count: int = integer(1, 1, meaning="a class with fewer images is not sent: the mean of one image is that image", unit="images")
    shrink_target: str = choice_of(TARGETS, "iso", meaning="target of the shrinkage (OAS)")
    server_floor: float = real(1e-4, 0.0, above=True, meaning="smallest variance of the server's covariance")


class Discriminant(nn.Module):
    """argmax_y log N(phi(x); c^y, Sigma^y) with equal priors: images (B, C, H, W) to log densities up to a constant, (B, classes)."""

    mean: Tensor
    inverse: Tensor
    offset: Tensor

    def __init__(self, map_: nn.Module, size: int, scale: Scale, classes: int):
        super().__init__()
        self.map, self.scale = map_, scale
        self.register_buffer("mean", torch.zeros(classes, size))
        self.register_buffer("inverse", torch.zeros(classes, size, size))                  # L^-1 of Sigma^y = L L^T
        self.register_buffer("offset", torch.zeros(classes))                               # log det L, or infinity for a class nobody has

    def forward(self, x: Tensor) -> Tensor:
        apart = self.map(self.scale.to_symmetric(x)).unsqueeze(1) - self.mean              # (B, C, p)
        white = torch.einsum("cij,bcj->bci", self.inverse, apart)
        return -0.5 * white.square().sum(2) - self.offset


class DiscriminantStep(DescribeLatents):
    """The client's model is the discriminant, whatever architecture the job gives it."""

    def modules(self, architecture: str) -> dict[str, nn.Module]:
        networks = self.latent.modules()
        return {"model": Discriminant(networks["map"], self.latent.size, self.problem.scale, self.problem.classes), **networks}

    def join(self, group: Group, site: ClientSite) -> Group:
        return group if group.part("model") else group.with_common_part("model", self.modules(group.architecture)["model"].state_dict())


class SendDiscriminantMoments(DiscriminantStep, latent_statistics.SendMoments):
    """Counts, means and covariances of phi(x), once."""


class AdoptGaussians(DiscriminantStep):
    """Every client turns the message into the classifier; all have the same."""

    refines = "adopt"

    def refine(self, group: Group, message: Tree, site: ClientSite) -> Update:
        gaussians = self.read_gaussians(message, site)
        factor = gaussians.factor.double()
        full = (factor if factor.dim() == 3 else torch.diag_embed(factor.expand(len(factor), gaussians.mean.shape[1]))).expand(self.problem.classes, -1, -1)
        offset = full.diagonal(dim1=1, dim2=2).log().sum(1).masked_fill(~gaussians.has, float("inf"))
        identity = torch.eye(full.shape[1], dtype=full.dtype, device=full.device)
        state = {"mean": gaussians.mean, "inverse": torch.linalg.solve_triangular(full, identity, upper=False).float(), "offset": offset.float()}
        return Update(group.with_common_part("model", {**tree.row(group.part("model"), 0), **state}))


def plan(config: Config, problem: Problem) -> Plan:
    """Statistics once, then the classifier."""
    return (Phase("statistics", 1, (SendDiscriminantMoments(config, problem),), everyone=True),
            Phase("classify", 1, (AdoptGaussians(config, problem),), everyone=True))
