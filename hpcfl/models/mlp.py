"""Fully connected networks with a common first layer, for small images."""
from collections import OrderedDict
from dataclasses import dataclass
from math import prod

from torch import nn

from hpcfl.models.classifier import Shape, Trunk, scale_width

SHRINK = 4          # the common extractor goes from N values to N / 4: 784 -> 196 on 28x28 (GeFL, specification section 4)


@dataclass(frozen=True)
class Mlp:
    """`depth` linear layers with ReLU, counting the common extractor and the head.

    GeFL's MLP-2..6 share a 784 -> 196 extractor; their hidden widths are not published, hence `hidden` (ours).
    A width shrinks the extractor too, which holds most of the weights: it is common to the clients of one width only.
    """

    depth: int
    hidden: int = 128

    def find_smallest(self) -> int:
        """2 pixels: the extractor keeps a quarter of the values."""
        return 2

    def build_trunk(self, shape: Shape, norm: str, width: float) -> Trunk:
        """Extractor (B, C, H, W) -> (B, CHW / 4) and body; there is nothing to normalise."""
        maps = scale_width(prod(shape) // SHRINK, width)
        layers, size = OrderedDict[str, nn.Module](), maps
        for index in range(1, self.depth - 1):
            layers |= {f"linear{index}": nn.Linear(size, scale_width(self.hidden, width)), f"relu{index}": nn.ReLU()}
            size = scale_width(self.hidden, width)
        extractor = nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(prod(shape), maps), relu=nn.ReLU()))
        return Trunk(extractor, (maps,), nn.Sequential(layers), size)
