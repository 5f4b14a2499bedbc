"""Common maps: features of images without training, the same on all clients, for generators that share one latent space."""
from collections.abc import Callable
from math import ceil, pi, prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcfl.errors import JobError, LayoutError
from hpcfl.models.classifier import Shape
from hpcfl.streams import Stream

COSINE_SCALE = 24.0          # gives low-frequency coefficients of images in [-1, 1] a deviation of about 1: above any floor of the covariance
ROOT_SCALE = 6.0             # the same for the rotated roots; a quarter of the other measured best for class Gaussians
COSINE_SHARE = 4             # one feature in 4 is a cosine coefficient of the image itself, so that joined maps can be decoded
ORIENTATIONS = 8
FILTERS = 16                 # of random_conv
GRID = 6                     # pooling windows per side; more where the wanted size needs them


class CommonMap(nn.Module):
    """Images in [-1, 1] (B, C, H, W) -> features (B, size): a differentiable function of the constructor's arguments, without parameters.

    Raises: LayoutError for images of another shape.
    """

    def __init__(self, shape: Shape, size: int) -> None:
        super().__init__()
        self.shape, self.size = tuple(shape), size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, size)."""
        if tuple(x.shape[1:]) != self.shape:
            raise LayoutError(f"a map built for images of {self.shape} got {tuple(x.shape)}; wanted (B, {', '.join(map(str, self.shape))})")
        return self.measure(x)

    def measure(self, x: Tensor) -> Tensor:
        """The features of images of the right shape."""
        raise NotImplementedError

    def keep(self, name: str, value: Tensor) -> None:
        """Store a float64 constant as a float32 buffer that no checkpoint needs."""
        self.register_buffer(name, value.float() if value.is_floating_point() else value, persistent=False)


class Cosines(CommonMap):
    """Low-frequency coefficients of the orthonormal cosine transform over the root of the pixels, scaled; k*k of grey are a k x k block.

    Colour goes through an orthonormal opponent transform first, and its two difference channels stop at half the frequency, because
    that is where the eye and photographs have little left (as in JPEG). Linear: the transposed matrix decodes it.
    """

    colours: Tensor
    rows: Tensor
    columns: Tensor
    chosen: Tensor

    def __init__(self, shape: Shape, size: int) -> None:
        super().__init__(shape, size)
        channels, height, side = shape
        row, column = torch.arange(height)[:, None], torch.arange(side)[None]
        order = 1 + torch.maximum(row, column) + torch.hypot(row.double(), column.double()) / (1000 * max(height, side))     # (H, W)
        sooner = torch.tensor([1.0] + [2.0] * (channels - 1), dtype=torch.float64)                                           # (C,)
        chosen = (sooner[:, None, None] * order).flatten().argsort(stable=True)[:size]
        channel, row, column = chosen // (height * side), chosen // side % height, chosen % side
        self.keep("colours", build_cosines(channels))      # (C, C): of three channels sum, red - blue and red + blue - 2 green
        self.keep("rows", build_cosines(height)[:int(row.max()) + 1] * (COSINE_SCALE / sqrt(height)))  # (h, H)
        self.keep("columns", build_cosines(side)[:int(column.max()) + 1] / sqrt(side))                 # (w, W)
        self.keep("chosen", (channel * len(self.rows) + row) * len(self.columns) + column)       # (size,)

    def measure(self, x: Tensor) -> Tensor:
        """The coefficients, coarse ones first."""
        spectrum = self.rows @ torch.einsum("ij,bjhw->bihw", self.colours, x) @ self.columns.T   # (B, C, h, w)
        return spectrum.flatten(1)[:, self.chosen]


class FilterBank(nn.Module):
    """(B, C, H, W) -> responses (B, O, H, W). `pitch` is the frequency of each row of `mixing`, (O,) and (O, O) orthonormal."""

    mixing: Tensor
    pitch: Tensor


class Roots(CommonMap):
    """Root of locally pooled, contrast-normalised responses of a rectified filter bank, rotated by cosines so that coarse features come first.

    Ours, after first-order scattering (Bruna and Mallat 2013) and histograms of oriented gradients (Dalal and Triggs 2005). The root makes
    classes of counts near Gaussian (Hellinger), which is what the statistics of FedVTC assume; the orthonormal rotation in space and over
    the bank changes no full-covariance Gaussian, makes diagonal ones better, and lets the size be cut anywhere.
    """

    down: Tensor
    across: Tensor
    rotation: Tensor

    def __init__(self, bank: FilterBank, shape: Shape, size: int) -> None:
        super().__init__(shape, size)
        self.bank = bank
        count = len(bank.pitch)
        windows = min(max(GRID, ceil(sqrt(2 * size / count))), *shape[1:])
        self.keep("down", build_windows(shape[1], windows))                                           # (g, H)
        self.keep("across", build_windows(shape[2], windows))                                         # (g, W)
        frequency = torch.arange(windows).double()
        order = 0.75 * bank.pitch[:, None, None] + torch.hypot(frequency[:, None], frequency[None])
        rotation = torch.kron(bank.mixing, torch.kron(build_cosines(windows), build_cosines(windows)))       # (O g g, O g g)
        self.keep("rotation", ROOT_SCALE * rotation[order.flatten().argsort(stable=True)[:size]])

    def measure(self, x: Tensor) -> Tensor:
        """The rotated roots, coarse ones first."""
        responses = self.bank(x)                                                                 # (B, O, H, W), not negative
        energy = F.avg_pool2d(responses.square().sum(1, keepdim=True), 7, 1, 3, count_include_pad=False)
        contrast = responses / ((energy + 1e-6).sqrt() + 0.1)
        pooled = self.down @ contrast @ self.across.T                                            # (B, O, g, g)
        return ((pooled + 1e-4).sqrt() - 0.25).flatten(1) @ self.rotation.T                      # 0.25: about their mean, for conditioning


class Orientations(FilterBank):
    """Strength of the gradient in 8 directions: relu(gradient . direction)^3 / |gradient|^2, of the channel with the largest gradient.

    (B, C, H, W) -> (B, 8, H, W). `pitch` is the frequency of each row of `mixing` around the circle.
    """

    slopes: Tensor
    directions: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        offset = torch.arange(-2, 3).double()
        bell = torch.exp(-2.0 * offset.square())                                                 # standard deviation: half a pixel
        slope = torch.outer(bell, offset * bell)
        slope = 2 * slope / slope.abs().sum()
        angle = 2 * pi * torch.arange(ORIENTATIONS).double() / ORIENTATIONS
        self.register_buffer("slopes", torch.stack([slope, slope.T])[:, None].float(), persistent=False)                 # (2, 1, 5, 5)
        self.register_buffer("directions", torch.stack([angle.cos(), angle.sin()], 1).float()[:, :, None, None], persistent=False)
        turns = torch.arange(1, ORIENTATIONS // 2).double()
        waves = torch.stack([torch.cos(turns[:, None] * angle), torch.sin(turns[:, None] * angle)], 1).flatten(0, 1) * sqrt(2.0)
        ends = torch.stack([torch.ones_like(angle), torch.cos(ORIENTATIONS / 2 * angle)])
        self.mixing = torch.cat([ends[:1], waves, ends[1:]]) / sqrt(ORIENTATIONS)                # (8, 8), orthonormal
        self.pitch = torch.cat([torch.zeros(1).double(), turns.repeat_interleave(2), torch.tensor([ORIENTATIONS / 2]).double()])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 8, H, W)."""
        planes = F.pad(x, (2, 2, 2, 2), mode="replicate").flatten(0, 1).unsqueeze(1)
        gradient = F.conv2d(planes, self.slopes).unflatten(0, x.shape[:2])                       # (B, C, 2, H, W)
        strongest = gradient.square().sum(2, keepdim=True).argmax(1, keepdim=True).expand(-1, 1, 2, -1, -1)
        gradient = gradient.gather(1, strongest)[:, 0]                                           # (B, 2, H, W)
        along = F.conv2d(gradient, self.directions).relu()                                       # (B, 8, H, W)
        return along * along.square() / (gradient.square().sum(1, keepdim=True) + 1e-6)


class RandomFilters(FilterBank):
    """ReLU of 16 random 5x5 filters of zero mean, drawn from the seed: (B, C, H, W) -> (B, 16, H, W)."""

    filters: Tensor

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        filters = torch.randn(FILTERS, channels, 5, 5, generator=Stream(seed, "maps/random_conv").torch())
        filters = filters - filters.mean((1, 2, 3), keepdim=True)
        self.register_buffer("filters", filters / filters.abs().sum((1, 2, 3), keepdim=True) * 2, persistent=False)
        self.mixing, self.pitch = build_cosines(FILTERS), torch.zeros(FILTERS).double()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 16, H, W)."""
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), self.filters).relu()


class Joined(CommonMap):
    """Cosines of the image for the decoder, beside roots of a filter bank for the classes."""

    def __init__(self, bank: FilterBank, shape: Shape, size: int) -> None:
        super().__init__(shape, size)
        low = min(ceil(size / COSINE_SHARE), prod(shape))
        self.maps = nn.ModuleList([Cosines(shape, low)] + ([Roots(bank, shape, size - low)] if size > low else []))

    def measure(self, x: Tensor) -> Tensor:
        """Cosine coefficients, then roots."""
        return torch.cat([each(x) for each in self.maps], 1)


MAPS: dict[str, tuple[Callable[[Shape, int, int], CommonMap], Callable[[Shape], int]]] = {       # constructor, largest size
    "dct": (lambda shape, size, seed: Cosines(shape, size), prod),
    "random_conv": (lambda shape, size, seed: Joined(RandomFilters(shape[0], seed), shape, size), lambda shape: FILTERS * min(shape[1:])**2),
    "scattering": (lambda shape, size, seed: Joined(Orientations(shape[0]), shape, size), lambda shape: ORIENTATIONS * min(shape[1:])**2),
}


def build(kind: str, shape: Shape, size: int, seed: int = 0) -> CommonMap:
    """The common map of a kind with exactly `size` features, for images (C, H, W); only random_conv depends on `seed`.

    `dct`: linear and the easiest to decode. `scattering`: features whose classes are far closer to Gaussians from 28 pixels on (sizes of
    128 to 192), harder to decode: a small generator blurs, and the features see that. `random_conv`: random filters in the same place.
    Raises: JobError for an unknown kind and for a size outside 1 to what images of that shape give.
    """
    if kind not in MAPS:
        raise JobError(f"map {kind!r} is not known; wanted one of {', '.join(MAPS)}")
    constructor, largest = MAPS[kind]
    if len(shape) != 3 or min(shape) < 1:
        raise JobError(f"map '{kind}': got images of {tuple(shape)}, wanted (C, H, W) of at least 1")
    if not 1 <= size <= largest(shape):
        raise JobError(f"map '{kind}': got {size} features, wanted 1 to {largest(shape)} for images of {tuple(shape)}")
    return constructor((shape[0], shape[1], shape[2]), size, seed)


def build_cosines(count: int) -> Tensor:
    """The orthonormal cosine transform (type 2), lowest frequency first: (count, count), float64."""
    frequency, place = torch.arange(count).double()[:, None], torch.arange(count).double()[None] + 0.5
    waves = torch.cos(pi * frequency * place / count) * sqrt(2 / count)
    return torch.cat([waves[:1] / sqrt(2), waves[1:]])


def build_windows(pixels: int, windows: int) -> Tensor:
    """Triangular windows that overlap by half and sum to 1 each: (windows, pixels), float64."""
    centre = (torch.arange(windows).double() + 0.5) * pixels / windows - 0.5
    weight = (1 - (torch.arange(pixels).double()[None] - centre[:, None]).abs() * windows / pixels).clamp_min(0)
    return weight / weight.sum(1, keepdim=True)
