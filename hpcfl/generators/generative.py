"""GenerativeModel: what GeFL asks of a kind of generator, and what its kinds share: rules as data, checks of settings, labels as inputs."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpcfl.errors import LayoutError
from hpcfl.models.classifier import Shape
from hpcfl.tree import Tree

Loss = Callable[[Any, Tree, Tree], tuple[Tensor, Tree]]            # as `fit` takes it: (modules, batch, context) -> (loss (), {name: scalar ()})
Call = Callable[..., Tensor]                                       # the forward of a network with one state, in eval mode and without gradients


@dataclass(frozen=True)
class Rule:
    """The update rule of one loss; the names are those of hpcfl.training.optimizers.Optimizer."""

    name: str
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0                                      # coupled: added to the gradient


class GenerativeModel(Protocol):
    """A kind of generative model with its widths and settings; a frozen value without weights, which are the clients' states.

    `value_range` says what training data x (B, *shape) and samples are: images in [0, 1] ("unit") or [-1, 1] ("symmetric"), or maps of a common
    extractor ("features"). Nothing clips samples to the range: as in GeFL, CVAE and DDPM may leave it.
    """

    @property
    def shape(self) -> Shape: ...
    @property
    def classes(self) -> int: ...
    @property
    def value_range(self) -> str: ...
    @property
    def decay(self) -> str: ...                                    # of the rate over the rounds of training: "none", or "linear" to zero
    @property
    def channels_last(self) -> bool | None: ...                    # memory format of training on a CPU, as `fit` takes it
    @property
    def calls(self) -> int: ...                                    # of the network "generator" for one batch of samples

    def networks(self) -> dict[str, nn.Module]:
        """New networks, initialised from torch's global generator: "generator", which samples need, and those that help to train it."""

    def noise(self, batch: Tree, generator: torch.Generator) -> Tree:
        """The batch {"x": (B, *shape), "y": int64 (B,), ...} with the random draws of one step; the generator is on the batch's device."""

    def losses(self) -> tuple[tuple[tuple[str, ...], Loss], ...]:
        """(names of the networks it trains, loss) in the order in which one step takes them."""

    def rules(self) -> tuple[Rule, ...]:
        """The update rule of each loss."""

    def data_loss(self) -> Loss:
        """A loss that is low for data that the generator knows; it depends on nothing but the data and the noise of a step."""

    def sample(self, call: Call, y: Tensor, generator: torch.Generator) -> Tensor:
        """Samples (B, *shape) of classes y int64 (B,); `call` is the forward of "generator", the generator is on the device of y."""


def check_model(model: GenerativeModel, sides: Callable[[int], bool], wanted: str, ranges: tuple[str, ...], **least: int) -> None:
    """Refuse settings that this kind has no network for. `wanted` says in words which sides `sides` takes; `least` bounds fields from below.

    Raises: LayoutError with what was given and what would do.
    """
    kind, (channels, height, width) = type(model).__name__, model.shape
    if channels < 1 or height != width or not sides(height):
        raise LayoutError(f"{kind}: got data of {tuple(model.shape)}, wanted (C, H, H) with H {wanted}: resize the images (data.image_size)")
    if model.value_range not in ranges:
        raise LayoutError(f"{kind}: value_range = {model.value_range!r} is not one it has; there are {', '.join(ranges)}")
    for name, bound in {"classes": 1, **least}.items():
        if getattr(model, name) < bound:
            raise LayoutError(f"{kind}: {name} = {getattr(model, name)} is too small; wanted at least {bound}")


def is_power_of_two(side: int, least: int) -> bool:
    """Whether a side is a power of two and at least `least`."""
    return side >= least and side.bit_count() == 1


def one_hot(y: Tensor, classes: int, like: Tensor) -> Tensor:
    """Labels (B,) as (B, classes) in the dtype of `like`; without the range check of torch's own, which waits for the device."""
    return (y.unsqueeze(-1) == torch.arange(classes, device=y.device)).to(like.dtype)


def planes(values: Tensor, like: Tensor) -> Tensor:
    """Values (B, n) as constant planes (B, n, H, W) beside maps `like` (B, C, H, W)."""
    return values[:, :, None, None].expand(-1, -1, *like.shape[2:])
