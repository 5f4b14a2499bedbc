"""Plain convolutional networks: the ten of GeFL with their common extractor, FedConv's, and a two-conv benchmark net."""
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hpcfl.models.classifier import Shape, Trunk, scale_width
from hpcfl.models.norms import NORMS

Layers = OrderedDict[str, nn.Module]

EXTRACTORS: dict[str, Callable[[int], tuple[int, ...]]] = {        # conv widths of the common extractor, from the image's channels
    "none": lambda channels: (),
    "gefl": lambda channels: (3, 10) if channels == 3 else (3,),   # MNIST, FMNIST: 36 parameters; CIFAR-10, CelebA: 390
    "svhn": lambda channels: (3,),                                 # one conv on colour too: 90 parameters
}


@dataclass(frozen=True)
class Cnn:
    """Extractor (conv-norm-ReLU per width, then one pool), conv-[norm]-ReLU-pool per body width, then perhaps a hidden linear layer.

    GeFL, specification section 4 (pages and code). Pools are 2x2 maximum and are left out once height or width is 1, so that 8x8 digits
    pass through all ten nets (ours). A width shrinks the body alone: the extractor's 3 or 10 channels are common to all clients by definition,
    whatever their width, so that the maps of one client fit the header of any other.
    """

    widths: tuple[int, ...]                  # of the body's convs
    extractor: str = "gefl"                  # key of EXTRACTORS
    normed: bool = False                     # a norm after every conv of the body (GeFL: FMNIST and SVHN)
    kernel: int = 3
    padding: int = 1
    hidden: int = 0                          # width of a linear layer with ReLU after the convs; 0: none

    def find_smallest(self) -> int:
        """The smallest height and width in pixels that leave a pixel for every conv."""
        return next(side for side in range(1, 1000) if self._fits(side))

    def build_trunk(self, shape: Shape, norm: str, width: float) -> Trunk:
        """Extractor and body for images (C, H, W); the body gives its flattened maps or the hidden layer."""
        extractor, maps = self._extractor(shape, norm)
        body, (channels, height, side) = self._body(maps, norm, width)
        body["flatten"] = nn.Flatten()
        size = channels * height * side
        if self.hidden:
            body |= {"hidden": nn.Linear(size, scale_width(self.hidden, width)), "hidden_relu": nn.ReLU()}
            size = scale_width(self.hidden, width)
        return Trunk(nn.Sequential(extractor), maps, nn.Sequential(body), size)

    def _extractor(self, shape: Shape, norm: str) -> tuple[Layers, Shape]:
        layers, (channels, height, side) = Layers(), shape
        for index, wanted in enumerate(EXTRACTORS[self.extractor](channels), 1):
            layers |= {f"conv{index}": nn.Conv2d(channels, wanted, 3, padding=1), f"norm{index}": NORMS[norm](wanted), f"relu{index}": nn.ReLU()}
            channels = wanted
        if layers and min(height, side) > 1:
            layers["pool"] = nn.MaxPool2d(2)
            height, side = height // 2, side // 2
        return layers, (channels, height, side)

    def _body(self, maps: Shape, norm: str, width: float) -> tuple[Layers, Shape]:
        layers, (channels, height, side) = Layers(), maps
        for index, wanted in enumerate((scale_width(wanted, width) for wanted in self.widths), 1):
            layers[f"conv{index}"] = nn.Conv2d(channels, wanted, self.kernel, padding=self.padding)
            if self.normed:
                layers[f"norm{index}"] = NORMS[norm](wanted)
            height, side = self._after_conv(height), self._after_conv(side)
            if min(height, side) > 1:
                layers[f"pool{index}"] = nn.MaxPool2d(2)           # before the ReLU: the same function and gradient, a quarter of the work
                height, side = height // 2, side // 2
            layers[f"relu{index}"] = nn.ReLU()
            channels = wanted
        return layers, (channels, height, side)

    def _fits(self, side: int) -> bool:
        side = max(1, side // 2) if self.extractor != "none" else side
        for _ in self.widths:
            side = self._after_conv(side)
            if side < 1:
                return False
            side = max(1, side // 2)
        return True

    def _after_conv(self, side: int) -> int:
        return side + 2 * self.padding - self.kernel + 1
