"""Class VTC (ours): FedVTC's generator as GeFL's generative model, a decoder of one fixed map of the data and a Gaussian of that map for each class."""
import functools
from dataclasses import dataclass
from math import log, prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from hpcfl.errors import LayoutError
from hpcfl.generators.generative import Call, Loss, Rule, one_hot, require
from hpcfl.generators.vtc import VTC
from hpcfl.models import fixed_maps
from hpcfl.models.classifier import Shape
from hpcfl.tree import Tree

UNIT = 32.0                  # of the classes' parameters: Adam's 1e-3 is then a step of 0.03, and means of up to 20 are reached in hundreds of steps
FIRST_DEVIATION = 16.0       # as wide as the means are far: from 1 the first gradients are so large that Adam, which remembers them, crawls for 1,000 steps
LEAST_DEVIATION = 0.1        # FedVTC's floor: a coefficient that is the same in all images of a class would make its likelihood grow without end
OUTPUT = {"symmetric": torch.tanh, "features": torch.relu}         # features: >= 0, no upper bound


@dataclass(frozen=True)
class Vtc:
    """z = phi(x), the coarsest `latent` cosine coefficients (hpcfl.models.fixed_maps), is decoded; each class has a diagonal Gaussian of z
    (FedVTC, arXiv 2508.01669).

    The map is no network: it has nothing to learn and is the same at all clients, so their Gaussians and decoders mean the same and may be averaged.
    `blur` is the share of a class's deviation that training adds to z: 1 is FedVTC's, less decodes sharper and wider spread samples.
    Raises: LayoutError for data that are not square, other ranges, and a latent of more coefficients than there are.
    """

    shape: Shape
    classes: int = 10
    latent: int = 64
    blur: float = 1.0
    value_range: str = "symmetric"                                 # or "features"
    decay: ClassVar[str] = "none"
    channels_last: ClassVar[bool | None] = None
    calls: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require(self, lambda side: side > 0, "of at least 1", tuple(OUTPUT), latent=1, blur=0)
        if self.latent > prod(self.shape):
            raise LayoutError(f"Vtc: latent = {self.latent} is too large; data of {tuple(self.shape)} have {prod(self.shape)} coefficients")

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": ClassDecoder(self)}

    def noise(self, batch: Tree, generator: torch.Generator) -> Tree:
        """z of the data, and eps."""
        x = batch["x"]
        eps = torch.randn(len(x), self.latent, generator=generator, device=x.device, dtype=x.dtype)
        return {**batch, "z": common_map(self.shape, self.latent, x.device, x.dtype)(x), "eps": eps}

    def losses(self) -> tuple[tuple[tuple[str, ...], Loss], ...]:
        return ((("generator",), self.decoding_loss),)

    def rules(self) -> tuple[Rule, ...]:
        return (Rule("adam", 1e-3, betas=(0.5, 0.999)),)           # as FedVTC's own

    def data_loss(self) -> Loss:
        return self.decoding_loss

    def decoding_loss(self, modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
        """|psi(z + blur sigma_y eps) - x|^2 - ln N(z; mu_y, sigma_y^2) less its constant; sums over pixels and coefficients, means over the batch.

        The first term trains psi alone, the second mu and sigma alone: reconstruction by itself would draw sigma to zero.
        """
        network, z = modules.generator, batch["z"]
        mean, deviation = network.gaussian(batch["y"])             # (B, p) each
        images = network.decoder(z + self.blur * deviation.detach() * batch["eps"])
        reconstruction = (images - batch["x"]).square().flatten(1).sum(1).mean()
        surprise = (deviation.log() + 0.5 * ((z - mean) / deviation).square()).sum(1).mean()
        return reconstruction + surprise, {"reconstruction": reconstruction, "surprise": surprise}

    def sample(self, call: Call, y: Tensor, generator: torch.Generator) -> Tensor:
        """psi(mu_y + sigma_y eps)."""
        return call(torch.randn(len(y), self.latent, generator=generator, device=y.device), y)


class ClassDecoder(nn.Module):
    """The VTC psi, and mu and ln sigma of each class (C, p) in multiples of UNIT."""

    def __init__(self, kind: Vtc) -> None:
        super().__init__()
        self.classes = kind.classes
        self.mean = nn.Parameter(torch.zeros(kind.classes, kind.latent))
        self.log_deviation = nn.Parameter(torch.full((kind.classes, kind.latent), log(FIRST_DEVIATION) / UNIT))
        self.decoder = VTC(kind.latent, kind.shape, output=OUTPUT[kind.value_range])

    def gaussian(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """mu and sigma, (B, p) each, of classes (B,)."""
        chosen = one_hot(y, self.classes, self.mean)               # not mean[y]: two threads sum its gradient in an order that changes
        mean, log_deviation = chosen @ (UNIT * self.mean), chosen @ (UNIT * self.log_deviation)
        return mean, ((2 * log_deviation).exp() + LEAST_DEVIATION ** 2).sqrt()

    def forward(self, eps: Tensor, y: Tensor) -> Tensor:
        """Data (B, C, H, H) of noise (B, p) and classes (B,)."""
        mean, deviation = self.gaussian(y)
        return self.decoder(mean + deviation * eps)


@functools.cache
def common_map(shape: Shape, size: int, device: torch.device, dtype: torch.dtype) -> fixed_maps.CommonMap:
    """phi on a device, built once."""
    return fixed_maps.build("dct", shape, size).to(device, dtype)
