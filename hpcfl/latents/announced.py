"""Announced: the class Gaussians as the server announces them and as a client draws from them."""
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcfl.latents import gaussians, moments
from hpcfl.latents.moments import MODES, ClassGaussians
from hpcfl.tree import Tree

HEADER = 4                                                         # int32 words in front of every message (client, round, mode, flags): 16 bytes


@dataclass(frozen=True)
class AnnouncedGaussians:
    """The class Gaussians on a client's device, float32 but for `has`.

    has (C,) bool, whether anybody has a sample of the class; mean (C, p); variance (C, p), the diagonal of each covariance; weight (C, p), inverse
    variances with mean 1 over the classes that are there; factor, what noise is multiplied with, as `gaussians.draw` takes it; precision (C, p) and
    coupling (C,), as `gaussians.precision` gives them.
    """

    has: Tensor
    mean: Tensor
    variance: Tensor
    weight: Tensor
    factor: Tensor
    precision: Tensor
    coupling: Tensor

    @classmethod
    def from_message(cls, message: Tree, mode: str, device: torch.device) -> "AnnouncedGaussians":
        """The Gaussians of a down message, as `announce_gaussians` made it; `mode`: that of the moments."""
        kind, has, mean, spread = MODES[mode], message["has"].bool(), message["mean"], message["spread"].double()
        spread = spread[None] if kind.shared else spread[:, None] if kind.isotropic else spread            # leading axis 1 or C
        factor = gaussians.compute_factors(moments.unpack_triangle(spread) if kind.full else spread)
        variance = (factor.square().sum(-1) if kind.full else spread).expand(mean.shape)                    # (C, p)
        inverse = 1 / variance.clamp_min(torch.finfo(torch.float32).tiny)
        weight = inverse / inverse[has].mean() if bool(has.any()) else torch.ones_like(inverse)
        precision, coupling = gaussians.precision(factor)
        leaves = mean, variance, weight, factor, precision.expand(mean.shape), coupling.expand(len(mean))
        return cls(has.to(device), *(leaf.float().to(device) for leaf in leaves))

    def draw(self, labels: Tensor, eps: Tensor) -> Tensor:
        """v = c^y + L_y eps, (B, p), for labels (B,) and eps (B, p) from N(0, I)."""
        return gaussians.draw(self.mean, self.factor, labels, eps)

    def distance(self, labels: Tensor, z: Tensor) -> Tensor:
        """(z - c^y)^T Sigma^-1 (z - c^y), (B,), of latents z (B, p) with labels (B,)."""
        return gaussians.distance(self.mean, self.factor, labels, z)


def make_empty(classes: int, size: int, mode: str) -> ClassGaussians:
    """The class Gaussians before anybody has sent moments: zeros, and `has` false everywhere."""
    z, y, centre = torch.zeros(0, size, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), torch.zeros(classes, size, dtype=torch.float64)
    return moments.from_sums(centre[:, 0], centre, moments.measure_scatter(z, y, centre, mode), mode)


def announce_gaussians(server: ClassGaussians, mode: str, target: str, floor: float) -> Tree:
    """The down message {"header", "has", "mean", "spread"}: covariances shrunk (OAS) and floored where the sample counts are known, then packed and cast."""
    kind, covariance = MODES[mode], server.spread
    if kind.full:
        count = server.count.sum() if kind.shared else server.count
        covariance = moments.pack_triangle(gaussians.floor(gaussians.shrink(covariance, count, target), floor))
    return {"header": torch.zeros(HEADER, dtype=torch.int32), "has": server.has.to(torch.uint8), "mean": server.mean.float(),
            "spread": covariance.float() if kind.full else covariance.clamp_min(floor).float()}
