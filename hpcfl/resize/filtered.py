"""Convolutional compression and dilation: a classifier whose weights are convolutions of another one's weights (FedConv, arXiv 2502.20639).

A parameter is seen as (P, n, n') images: a conv weight (n, n', kx, ky) as one n x n' image for each of its P = kx ky kernel positions, every other
parameter as one image. Its filter turns (P, n, n') into (P, m, m') by convolution, with a kernel of its own for each position. Shapes alone
decide the kernels, |n - m| + 1 by |n' - m'| + 1, so that image channels, classes and tables of positions keep their sizes.
"""
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from hpcfl.errors import LayoutError
from hpcfl.resize.derived import Derived, from_channels_last, to_name
from hpcfl.tree import Tree

SOURCE = "source"                                                  # prefix of the weights that are convolved among the parameters of a Filtered
NEGATIVE, POSITIVE = 0.001, 0.85                                   # slopes of the MLR
NOISE = 0.1                                                        # norm of what `slice` adds to a kernel of norm 1


def apply_mlr(values: Tensor, passes: int) -> Tensor:
    """Modified leaky ReLU, 0.001 v for v < 0 and 0.85 v for v >= 0, applied `passes` times (the published code: twice; 0: not at all)."""
    return torch.where(values < 0, NEGATIVE ** passes, POSITIVE ** passes) * values if passes else values


class WeightFilter(nn.Module):
    """The filter of one parameter, (n, n', ...) to (m, m', ...), where all axes shrink (compression) or all grow (dilation); specification, section 3.

    u = gain W + bias (+ W, the residual, for conv weights) for each kernel position; then a valid convolution where axes shrink, a transposed one where they
    grow, with the weight-normalised kernel g v / ||v||; then the MLR. Convolutions are products of spectra: kernels here are as large as a
    third of the image, all positions are one batch, and at this length circular wrapping does not reach the elements that are kept.
    Raises: LayoutError where one axis shrinks and another grows.
    """

    def __init__(self, source: torch.Size, target: torch.Size, is_convolution: bool, mlr_passes: int = 1) -> None:
        super().__init__()
        self.shape, self.is_convolution, self.mlr_passes = tuple(target), is_convolution, mlr_passes
        given, wanted = _image_shape(source, is_convolution), _image_shape(target, is_convolution)       # (P, n, n'), (P, m, m')
        self.grows = prod(wanted) > prod(given)
        small, large = (given, wanted) if self.grows else (wanted, given)
        if small[0] != large[0] or small[1] > large[1] or small[2] > large[2]:
            raise LayoutError(f"a weight of {tuple(source)} cannot be resized to {tuple(target)}; wanted all channels to shrink or all to grow, "
                              "and one kernel size")
        kernel = tuple(many - few + 1 for few, many in zip(small[1:], large[1:], strict=True))
        self.axes = tuple(axis for axis in (1, 2) if kernel[axis - 1] > 1)
        self.lengths = tuple(large[axis] for axis in self.axes)    # of the transforms: as far as the convolution reaches
        self.wanted = wanted
        self.gain, self.bias = nn.Parameter(torch.empty(small[0], 1, 1)), nn.Parameter(torch.empty(small[0], 1, 1))
        self.direction = nn.Parameter(torch.empty(small[0], *kernel)) if self.axes else None           # v; of one number only the norm counts
        self.norm = nn.Parameter(torch.empty(small[0], 1, 1))                                          # g
        self.reset_parameters()

    def reset_parameters(self, init: str = "slice") -> None:
        """New parameters; `init` is a key of INITS."""
        with torch.no_grad():
            INITS[init](self)
            if self.direction is not None:
                self.norm.copy_(torch.linalg.vector_norm(self.direction, dim=(1, 2), keepdim=True))

    def become_slice(self) -> None:
        """Ours: compression begins as the leading channels, dilation as these among zeros, both with a little noise; so tuning starts from what W knows."""
        self.gain.fill_(1.0 - self.is_convolution)                 # with the residual u = W
        self.bias.zero_()
        self.norm.fill_(1.0)
        if self.direction is not None:
            self.direction.normal_(0.0, NOISE * prod(self.direction.shape[1:]) ** -0.5)
            self.direction[:, 0, 0] += 1

    def become_default(self) -> None:
        """PyTorch's defaults for a 1x1 convolution with bias and for a weight-normalised convolution without."""
        for parameter in self.parameters():
            bound = prod(parameter.shape[1:]) ** -0.5              # one over the square root of the inputs: those of the kernel, or one
            parameter.uniform_(-bound, bound)

    def forward(self, weight: Tensor) -> Tensor:
        """W (n, n', ...) to (m, m', ...)."""
        w = _to_image(weight, self.is_convolution)                                                     # (P, n, n')
        u = (self.gain + float(self.is_convolution)) * w + self.bias
        return _from_image(apply_mlr(self.convolve(u), self.mlr_passes), self.shape, self.is_convolution)

    def convolve(self, u: Tensor) -> Tensor:
        """(P, n, n') to (P, m, m'): what conv2d and conv_transpose2d of stride 1 with P groups give for the kernels g v / ||v||."""
        if self.direction is None:
            return u * self.norm
        kernel = self.direction * (self.norm / torch.linalg.vector_norm(self.direction, dim=(1, 2), keepdim=True))
        spectrum = torch.fft.rfftn(kernel, self.lengths, self.axes)
        spectrum = spectrum if self.grows else spectrum.conj()     # torch's convolution is a correlation, its transposed one a convolution
        v = torch.fft.irfftn(torch.fft.rfftn(u, self.lengths, self.axes) * spectrum, self.lengths, self.axes)
        return v[:, :self.wanted[1], :self.wanted[2]]


class Filtered(Derived):
    """A classifier f(x; filters(W)): it learns the filters, and the source model's weights W are fixed. A layer's type says whether it is a convolution."""

    def __init__(self, source: nn.Module, target: nn.Module, mlr_passes: int = 1) -> None:
        """`source`, `target`: one model at two widths; only their shapes count."""
        super().__init__(target)
        shapes = {path: parameter.shape for path, parameter in target.named_parameters()}
        convolutions = {f"{name}.weight" for name, layer in source.named_modules() if isinstance(layer, nn.Conv2d)}
        self.paths = tuple(shapes)
        self.filters = nn.ModuleDict({to_name(path): WeightFilter(parameter.shape, shapes[path], path in convolutions, mlr_passes)
                                      for path, parameter in source.named_parameters()})
        for path, parameter in source.named_parameters():
            self.register_parameter(f"{SOURCE}:{to_name(path)}", nn.Parameter(torch.zeros_like(parameter), requires_grad=False))

    def reset_parameters(self, init: str = "slice") -> None:
        """New filters; `init` is a key of INITS."""
        for each in self.filters.values():
            cast(WeightFilter, each).reset_parameters(init)

    def derive_state(self, source: Tree) -> Tree:
        """All of this module's state but the filters, for a source model's state_dict."""
        return self.derive_buffers(source) | {f"{SOURCE}:{to_name(path)}": source[path] for path in self.paths}

    def derive_parameters(self) -> Tree:
        """The resized parameters, differentiable with respect to the filters."""
        return {path: self.filters[to_name(path)](getattr(self, f"{SOURCE}:{to_name(path)}")) for path in self.paths}


INITS = {"slice": WeightFilter.become_slice, "default": WeightFilter.become_default}


def _image_shape(shape: torch.Size, is_convolution: bool) -> tuple[int, int, int]:
    """(P, n, n') of a parameter; a vector is one row, and a table (..., n, n') rows under each other."""
    if is_convolution:
        return prod(shape[2:]), shape[0], shape[1]
    return 1, prod(shape[:-1]), shape[-1]


def _to_image(weight: Tensor, is_convolution: bool) -> Tensor:
    if is_convolution:
        return weight.flatten(2).permute(2, 0, 1)
    return weight.reshape(1, -1, weight.shape[-1])


def _from_image(image: Tensor, shape: tuple[int, ...], is_convolution: bool) -> Tensor:
    return from_channels_last(image.transpose(0, 1), shape) if is_convolution else image.reshape(shape)
