"""Model: a classifier, cut where federated methods cut it: extractor -> maps -> body -> projection -> features -> head -> logits."""
import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from hpcfl.errors import JobError, LayoutError

Shape = tuple[int, int, int]         # (channels, height, width)


@dataclass(frozen=True)
class Trunk:
    """What a family builds: the extractor (B, C, H, W) -> (B, *maps), and the body (B, *maps) -> (B, size), which ends in a ReLU."""

    extractor: nn.Module
    maps: tuple[int, ...]
    body: nn.Module
    size: int


class Family(Protocol):
    """A kind of network whose fields are its widths and depths; one frozen instance is one entry of the zoo."""

    def find_smallest(self) -> int:
        """The smallest height and width in pixels that the network can take."""

    def build_trunk(self, shape: Shape, norm: str, width: float) -> Trunk:
        """Extractor and body for images of `shape`, every hidden width c being `scale_width(c, width)`; a family says which widths it does not shrink."""


class Model(nn.Module):
    """A classifier f = head o features with a feature size p that all clients can share.

    `features` (B, C, H, W) -> (B, p), `head` (B, p) -> (B, classes), `forward` = head(features). GeFL-F enters at the maps of the common
    extractor: `extractor` (B, C, H, W) -> (B, *maps_shape), `header` (B, *maps_shape) -> (B, classes); families without a common
    extractor have an empty one, so maps are images. Linear and ReLU lead from the body to p; a body of size p needs neither, because
    every body ends in a ReLU (FedVTC, specification section 6: `feature_relu` is one switch, the same for all clients).
    No module draws random numbers when it runs.

    Raises: LayoutError for images of another shape than the model was built for.
    """

    def __init__(self, trunk: Trunk, shape: Shape, classes: int, features: int = 0, feature_relu: bool = True) -> None:
        super().__init__()
        keeps = features == 0 or (feature_relu and features == trunk.size)
        self.shape, self.classes = tuple(shape), classes
        self.maps_shape, self.feature_size = trunk.maps, trunk.size if keeps else features
        self.extractor = trunk.extractor
        self.body = trunk.body
        self.projection = nn.Identity() if keeps else nn.Linear(trunk.size, features)
        self.activation = nn.ReLU() if feature_relu and not keeps else nn.Identity()
        self.head = nn.Linear(self.feature_size, classes)

    def embed(self, maps: Tensor) -> Tensor:
        """Features of extractor maps: (B, *maps_shape) -> (B, p)."""
        return self.activation(self.projection(self.body(maps)))

    def features(self, x: Tensor) -> Tensor:
        """Features of images: (B, C, H, W) -> (B, p)."""
        if tuple(x.shape[1:]) != self.shape:
            raise LayoutError(f"a model built for images of {self.shape} got {tuple(x.shape)}; wanted (B, {', '.join(map(str, self.shape))})")
        return self.embed(self.extractor(x))

    def header(self, maps: Tensor) -> Tensor:
        """Logits of extractor maps: (B, *maps_shape) -> (B, classes)."""
        return self.head(self.embed(maps))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images: (B, C, H, W) -> (B, classes)."""
        return self.head(self.features(x))


def scale_width(channels: int, width: float) -> int:
    """A hidden width at a shrinkage ratio: int(c * width), as FedConv's published code rounds.

    Raises: JobError where no channel is left, for a layer without channels computes nothing.
    """
    left = int(channels * width)
    if left < 1:
        least = math.ceil(10_000 / channels) / 10_000
        raise JobError(f"a hidden layer of {channels} channels has none left at width {width:g}; wanted a width of at least {least:g}: choose a "
                       "wider model, fewer size classes (models.sizes) or a shrinkage nearer to 1")
    return left
