"""FedDCGAN and FedDCGAN-F: GeFL's class-conditional DCGAN for images and for the maps of a common extractor (arXiv 2412.18460)."""
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcfl.errors import LayoutError
from hpcfl.generators.generative import Call, Loss, Rule, check_model, is_power_of_two, one_hot, planes
from hpcfl.models.classifier import Shape
from hpcfl.tree import Tree

SLOPE = 0.2                  # of the leaky ReLUs
DEVIATION = 0.02             # of the initial weights of convs and transposed convs; their biases start at zero
BASE = 4                     # pixels where the generator begins
LAST = {"symmetric": 4, "features": 2}                             # pixels of the discriminator's last conv
HIDDEN: dict[str, Callable[[], nn.Module]] = {"symmetric": nn.ReLU, "features": lambda: nn.LeakyReLU(SLOPE)}        # of the generator
OUTPUT: dict[str, Callable[[], nn.Module]] = {"symmetric": nn.Tanh, "features": nn.ReLU}                            # features: >= 0, no upper bound


@dataclass(frozen=True)
class Dcgan:
    """Generator and discriminator that both read the class, with the non-saturating loss; data in [-1, 1] or features.

    Paper widths: 128 and 128 for MNIST, FMNIST and SVHN, 256 and 64 for CIFAR-10. Sides beside 32 (images) and 16 (features) are powers of
    two from 8 on and come from one block more or less, the widest end of both networks doubling (ours).
    Raises: LayoutError for other sides, ranges and widths.
    """

    shape: Shape
    classes: int = 10
    width_g: int = 128
    width_d: int = 128
    noise_size: int = 100
    value_range: str = "symmetric"                                 # or "features"
    decay: ClassVar[str] = "none"
    channels_last: ClassVar[bool | None] = None
    calls: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_model(self, lambda side: is_power_of_two(side, 8), "a power of two of at least 8", tuple(OUTPUT), width_g=2, width_d=2, noise_size=1)
        if self.width_g % 2 or self.width_d % 2:
            raise LayoutError(f"Dcgan: got width_g {self.width_g} and width_d {self.width_d}; wanted even numbers, half for the data and half for the class")

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": Generator(self), "discriminator": Discriminator(self)}

    def noise(self, batch: Tree, generator: torch.Generator) -> Tree:
        """z', y' for the discriminator's step, z'', y'' for the generator's: classes are uniform."""
        drawn = {}
        for number in ("1", "2"):
            drawn[f"z{number}"] = self._normal(batch["y"], generator, batch["x"].dtype)                                     # (B, noise_size)
            drawn[f"y{number}"] = torch.randint(self.classes, batch["y"].shape, generator=generator, device=batch["y"].device)
        return {**batch, **drawn}

    def losses(self) -> tuple[tuple[tuple[str, ...], Loss], ...]:
        return (("discriminator",), discriminator_loss), (("generator",), generator_loss)

    def rules(self) -> tuple[Rule, ...]:
        return (Rule("adam", 2e-4, betas=(0.5, 0.999)),) * 2       # GeFL, specification section 3.1

    def data_loss(self) -> Loss:
        return realness

    def sample(self, call: Call, y: Tensor, generator: torch.Generator) -> Tensor:
        """G(z, y) with z ~ N(0, I)."""
        return call(self._normal(y, generator), y)

    def _normal(self, y: Tensor, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(len(y), self.noise_size, generator=generator, device=y.device, dtype=dtype)


class Generator(nn.Module):
    """Noise and one-hot class, each through a transposed conv to half of the 4x4 maps, then a doubling per block."""

    def __init__(self, kind: Dcgan) -> None:
        super().__init__()
        self.classes, features = kind.classes, kind.value_range == "features"
        doublings = (kind.shape[1] // BASE).bit_length() - 1       # 32x32 images: 3, 16x16 features: 2, both from 4 width_g
        widths = [kind.width_g << (level + features) for level in reversed(range(doublings))]
        self.noise, self.label = (nn.Sequential(nn.ConvTranspose2d(size, widths[0] // 2, BASE), nn.BatchNorm2d(widths[0] // 2),
                                                HIDDEN[kind.value_range]()) for size in (kind.noise_size, kind.classes))
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (width, wanted) in enumerate(pairwise(widths), 1):
            layers |= {f"up{index}": nn.ConvTranspose2d(width, wanted, 4, 2, 1), f"norm{index}": nn.BatchNorm2d(wanted),
                       f"relu{index}": HIDDEN[kind.value_range]()}
        layers |= {f"up{doublings}": nn.ConvTranspose2d(widths[-1], kind.shape[0], 4, 2, 1), "output": OUTPUT[kind.value_range]()}
        self.layers = nn.Sequential(layers)
        self.apply(start_small)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Data of noise (B, noise_size) and classes (B,): (B, C, H, H)."""
        maps = self.noise(z[:, :, None, None]), self.label(one_hot(y, self.classes, z)[:, :, None, None])
        return self.layers(torch.cat(maps, 1))                     # from (B, widths[0], 4, 4)


class Discriminator(nn.Module):
    """Data and one-hot planes of the class, each through a conv to half of the first maps, then a halving per block; logits instead of a sigmoid."""

    def __init__(self, kind: Dcgan) -> None:
        super().__init__()
        self.classes, last = kind.classes, LAST[kind.value_range]
        halvings = (kind.shape[1] // last).bit_length() - 1        # 3 for 32x32 images and for 16x16 features
        widths = [kind.width_d << level for level in range(halvings)]
        self.data, self.label = (nn.Sequential(nn.Conv2d(channels, widths[0] // 2, 4, 2, 1), nn.LeakyReLU(SLOPE))
                                 for channels in (kind.shape[0], kind.classes))
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (width, wanted) in enumerate(pairwise(widths), 1):
            layers |= {f"down{index}": nn.Conv2d(width, wanted, 4, 2, 1), f"norm{index}": nn.BatchNorm2d(wanted), f"relu{index}": nn.LeakyReLU(SLOPE)}
        layers |= {"last": nn.Conv2d(widths[-1], 1, last), "flatten": nn.Flatten(0)}
        self.layers = nn.Sequential(layers)
        self.apply(start_small)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits (B,) that data (B, C, H, H) of classes (B,) are real."""
        maps = self.data(x), self.label(planes(one_hot(y, self.classes, x), x))
        return self.layers(torch.cat(maps, 1))


def start_small(layer: nn.Module) -> None:
    """Initialisation of convs and transposed convs: weights N(0, 0.02^2), biases zero; norms keep torch's."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, 0.0, DEVIATION)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def realness(modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """BCE(D(x, y), 1), on logits."""
    return -F.logsigmoid(modules.discriminator(batch["x"], batch["y"])).mean(), {}


def discriminator_loss(modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """BCE(D(x, y), 1) + BCE(D(G(z', y'), y'), 0), on logits; no gradient goes into G."""
    real, _ = realness(modules, batch, context)
    fake = modules.discriminator(modules.generator(batch["z1"], batch["y1"]).detach(), batch["y1"])
    loss = real - F.logsigmoid(-fake).mean()
    return loss, {"discriminator": loss}


def generator_loss(modules, batch: Tree, context: Tree) -> tuple[Tensor, Tree]:
    """BCE(D(G(z'', y''), y''), 1), on logits."""
    loss = -F.logsigmoid(modules.discriminator(modules.generator(batch["z2"], batch["y2"]), batch["y2"])).mean()
    return loss, {"generator": loss}
