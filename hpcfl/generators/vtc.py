"""VTC: FedVTC's generator, a linear layer and transposed convs from a latent vector to an image."""
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from math import ceil, prod

import torch
from torch import Tensor, nn

from hpcfl.errors import LayoutError
from hpcfl.models.classifier import Shape
from hpcfl.models.norms import group_norm

SLOPE = 0.2                  # of the leaky ReLUs
DEVIATION = 0.02             # of the initial transposed-conv weights
LEAST_DOUBLINGS = 2
LEAST_BASE = 4               # pixels: above 28, double as often as a base of 4 pixels allows
LEAST_CHANNELS = 16


class VTC(nn.Module):
    """Linear, then GroupNorm - LeakyReLU - transposed conv (kernel 4, stride 2, padding 1) per doubling, then tanh or another `output`.

    (B, latent) -> (B, C, H, W), in [-1, 1] by tanh. GroupNorm has no running statistics, so averaging over unequal clients is sound; with no
    `channels` the layers are those of the specification's section 4 for 28, 32 and 64 pixels (assumed there: the paper's are unknown).
    Other sizes come from the next larger base by cutting off the border (ours).

    Raises: LayoutError for latents of another size; a mismatch would otherwise surface as a matrix product far from its cause.
    """

    def __init__(self, latent: int, shape: Shape, channels: tuple[int, ...] | None = None,
                 output: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        if latent < 1 or len(shape) != 3 or min(shape) < 1 or (channels is not None and (not channels or min(channels) < 1)):
            raise LayoutError(f"VTC: got latent {latent}, image {tuple(shape)}, channels {channels}; wanted numbers of at least 1, image (C, H, W)")
        widths = channels or default_channels(shape)
        self.latent, self.shape, self.output = latent, tuple(shape), output
        self.base = (widths[0], *(ceil(side / 2 ** len(widths)) for side in shape[1:]))
        self.start = nn.Linear(latent, prod(self.base))
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (width, wanted) in enumerate(pairwise((*widths, shape[0])), 1):
            up = nn.ConvTranspose2d(width, wanted, 4, 2, 1, bias=index == len(widths))
            nn.init.normal_(up.weight, 0.0, DEVIATION)
            layers |= {f"norm{index}": group_norm(width), f"relu{index}": nn.LeakyReLU(SLOPE), f"up{index}": up}
        self.layers = nn.Sequential(layers)

    def forward(self, v: Tensor) -> Tensor:
        """Images of latents: (B, latent) -> (B, C, H, W)."""
        if v.shape[-1] != self.latent:
            raise LayoutError(f"VTC: got latents of size {v.shape[-1]}, wanted {self.latent}; generator and features (models.feature_size) must share p")
        maps = self.start(v).unflatten(1, self.base)               # (B, widths[0], base H, base W)
        image = self.layers(maps)                                  # (B, C, >= H, >= W)
        top, left = ((got - wanted) // 2 for got, wanted in zip(image.shape[2:], self.shape[1:], strict=True))
        return self.output(image[:, :, top:top + self.shape[1], left:left + self.shape[2]])


def default_channels(shape: Shape) -> tuple[int, ...]:
    """Widths from the base on, one per doubling: 128, 64 up to 28 pixels; 256, 128, 64 at 32; 256, 128, 64, 32 at 64."""
    doublings = max(LEAST_DOUBLINGS, (max(shape[1:]) // LEAST_BASE).bit_length() - 1)
    widest = 128 if doublings == LEAST_DOUBLINGS else 256
    return tuple(max(LEAST_CHANNELS, widest >> index) for index in range(doublings))
