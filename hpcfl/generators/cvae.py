"""FedCVAE and FedCVAE-F: GeFL's class-conditional variational autoencoder for images and for the maps of a common extractor (arXiv 2412.18460)."""
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from hpcfl.generators.generative import Call, Loss, Rule, one_hot, planes, power_of_two, require
from hpcfl.models.classifier import Shape
from hpcfl.tree import Tree

TANH_FROM = 64               # pixels: larger images end in tanh, as the published 64x64 variant does
RANGES = ("unit", "symmetric", "features")


@dataclass(frozen=True)
class Cvae:
    """Encoder and decoder that both read the class, as many halvings and doublings as lead to one pixel.

    Paper latents: 16 for MNIST, FMNIST and SVHN, 50 for CIFAR-10. The decoder ends in ReLU for images in [0, 1] and features; for images in
    [-1, 1], which one branch of the published code has for CIFAR-10 with a ReLU that cannot reach them, in tanh (ours).
    Raises: LayoutError for sides that are no powers of two, other ranges and widths.
    """

    shape: Shape
    classes: int = 10
    latent: int = 16
    width: int = 64                                                # channels of the first block; each next one doubles them
    value_range: str = "unit"                                      # or "symmetric", "features"
    decay: ClassVar[str] = "none"
    channels_last: ClassVar[bool | None] = False                   # kernels of a million weights on maps of a few pixels: a third of a step to lay them out
    calls: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require(self, lambda side: power_of_two(side, 2), "a power of two of at least 2", RANGES, latent=1, width=1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the encoder's blocks, the last at one pixel: 64 ... 1024 for 32x32, 64 ... 512 for 16x16."""
        return tuple(self.width << level for level in range(self.shape[1].bit_length() - 1))

    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": Encoder(self), "generator": Decoder(self)}

    def noise(self, batch: Tree, generator: torch.Generator) -> Tree:
        """eps of the reparametrisation."""
        return {**batch, "eps": self._normal(batch["y"], generator, batch["x"].dtype)}

    def losses(self) -> tuple[tuple[tuple[str, ...], Loss], ...]:
        return ((("encoder", "generator"), negative_bound),)

    def rules(self) -> tuple[Rule, ...]:
        return (Rule("adam", 1e-3, weight_decay=1e-3),)            # GeFL, specification section 3.3

    def data_loss(self) -> Loss:
        return negative_bound

    def sample(self, call: Call, y: Tensor, generator: torch.Generator) -> Tensor:
        """The decoder's mean for z ~ N(0, I)."""
        return call(self._normal(y, generator), y)

    def _normal(self, y: Tensor, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(len(y), self.latent, generator=generator, device=y.device, dtype=dtype)


class Encoder(nn.Module):
    """Data and a plane filled with the number of the class (not one-hot, not scaled), conv - BatchNorm - ReLU per halving, two linear heads."""

    def __init__(self, kind: Cvae) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (width, wanted) in enumerate(pairwise((kind.shape[0] + 1, *kind.widths)), 1):
            layers |= {f"down{index}": nn.Conv2d(width, wanted, 4, 2, 1), f"norm{index}": nn.BatchNorm2d(wanted), f"relu{index}": nn.ReLU()}
        layers["flatten"] = nn.Flatten()
        self.layers = nn.Sequential(layers)
        self.mean, self.log_variance = nn.Linear(kind.widths[-1], kind.latent), nn.Linear(kind.widths[-1], kind.latent)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma^2, each (B, latent), of data (B, C, H, H) of classes (B,)."""
        h = self.layers(torch.cat([x, planes(y.unsqueeze(1).to(x.dtype), x)], 1))           # (B, widths[-1])
        return self.mean(h), self.log_variance(h)


class Decoder(nn.Module):
    """Latent and one-hot class, linear - ReLU to one pixel, transposed conv - BatchNorm - ReLU per doubling, the last one without norm."""

    def __init__(self, kind: Cvae) -> None:
        super().__init__()
        self.classes, widths = kind.classes, kind.widths[::-1]
        self.start = nn.Sequential(nn.Linear(kind.latent + kind.classes, widths[0]), nn.ReLU(), nn.Unflatten(1, (widths[0], 1, 1)))
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (width, wanted) in enumerate(pairwise(widths), 1):
            layers |= {f"up{index}": nn.ConvTranspose2d(width, wanted, 4, 2, 1), f"norm{index}": nn.BatchNorm2d(wanted), f"relu{index}": nn.ReLU()}
        tanh = kind.value_range == "symmetric" or (kind.value_range == "unit" and kind.shape[1] >= TANH_FROM)
        layers |= {f"up{len(widths)}": nn.ConvTranspose2d(widths[-1], kind.shape[0], 4, 2, 1), "output": nn.Tanh() if tanh else nn.ReLU()}
        self.layers = nn.Sequential(layers)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Data of latents (B, latent) and classes (B,): (B, C, H, H)."""
        return self.layers(self.start(torch.cat([z, one_hot(y, self.classes, z)], 1)))


def negative_bound(modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """sum (x^ - x)^2 - 1/2 sum (1 + log sigma^2 - mu^2 - sigma^2) with z = mu + sigma * eps; sums over pixels, latents and batch."""
    mean, log_variance = modules.encoder(batch["x"], batch["y"])
    z = mean + (0.5 * log_variance).exp() * batch["eps"]
    reconstruction = (modules.generator(z, batch["y"]) - batch["x"]).square().sum()
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return reconstruction + divergence, {"reconstruction": reconstruction, "kl": divergence}
