"""Shards: labelled images that stay uint8 on the device, scaled to what the classifier reads batch by batch."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcfl import tree
from hpcfl.data.augment import Augmentation
from hpcfl.data.corpora import Corpus
from hpcfl.errors import DataError
from hpcfl.streams import Stream
from hpcfl.tree import Tree

RANGES = {"symmetric": (0.5, 0.5), "unit": (0.0, 1.0)}             # (centre, half width) of the classifier's range, in units of full brightness
BLOCK = 1024                                                       # images per histogram: bincount works in 8 bytes per pixel
PLAIN = Augmentation()                                             # leaves everything as it is


@dataclass(frozen=True)
class Scale:
    """From uint8 images to the classifier's range and between ranges; `normalization` is "symmetric" [-1, 1], "unit" [0, 1] or "standard".

    In every range x = (brightness - centre) / deviation with brightness in [0, 1]; "standard" takes the data's mean and standard deviation per
    channel for them (see `from_images`). `size` resizes to size x size, 0 leaves images as they are.

    Raises: DataError for "standard" without mean and std, and for one that does not exist.
    """

    normalization: str = "symmetric"
    size: int = 0
    mean: tuple[float, ...] = ()                                   # (C,), of brightness in [0, 1]
    std: tuple[float, ...] = ()                                    # (C,)

    def __post_init__(self) -> None:
        if self.normalization not in RANGES and self.normalization != "standard":
            raise DataError(f"normalization = {self.normalization!r} does not exist; there are {', '.join(RANGES)}, standard")
        if self.normalization == "standard" and not (len(self.mean) == len(self.std) > 0 and min(self.std) > 0):
            raise DataError(f"normalization = 'standard' with mean {self.mean} and std {self.std}; wanted one positive std per channel: use Scale.from_images")

    @classmethod
    def from_images(cls, images: np.ndarray, normalization: str, size: int = 0) -> "Scale":
        """The Scale whose mean and standard deviation are those of uint8 images (n, C, H, W) before resizing, exact and in any order of images.

        A channel that is constant gets standard deviation 1. Raises: DataError where there is no image.
        """
        if len(images) == 0:
            raise DataError("normalization = 'standard' needs at least one image to take mean and standard deviation from; got none")
        counts = sum((np.stack([np.bincount(channel.ravel(), minlength=256) for channel in images[start:start + BLOCK].swapaxes(0, 1)])
                      for start in range(0, len(images), BLOCK)), np.zeros((), np.int64))            # (C, 256): how often each brightness occurs
        levels, shares = np.arange(256) / 255, counts / counts.sum(axis=1, keepdims=True)
        mean = shares @ levels                                     # (C,)
        std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1))
        return cls(normalization, size, tuple(mean.tolist()), tuple(np.where(std > 0, std, 1.0).tolist()))

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as the classifier reads them, float32 (B, C, size or H, size or W); float images pass unchanged.

        Resizing is bilinear, with antialiasing where it shrinks.
        """
        if images.is_floating_point():
            return images
        x = images.to(torch.float32)
        if self.size and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        centre, deviation = self._affine(x, 255.0)
        return x.sub_(centre).div_(deviation)                         # x is ours: a fresh float tensor

    def from_symmetric(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] (a generator's output, (B, C, H, W)) in the classifier's range; gradients pass."""
        centre, deviation = self._affine(x)
        return x * (0.5 / deviation) + (0.5 - centre) / deviation

    def to_symmetric(self, x: Tensor) -> Tensor:
        """Classifier input (B, C, H, W) in [-1, 1], undoing `from_symmetric`; gradients pass."""
        centre, deviation = self._affine(x)
        return x * (2 * deviation) + (2 * centre - 1)

    def to_unit(self, x: Tensor) -> Tensor:
        """Classifier input (B, C, H, W) as brightness in [0, 1]; what lies outside by rounding or because a generator drew it there is cut off."""
        centre, deviation = self._affine(x)
        return (x * deviation + centre).clamp(0.0, 1.0)

    def _affine(self, x: Tensor, unit: float = 1.0) -> tuple[float | Tensor, float | Tensor]:
        """Centre and deviation in multiples of `unit`: numbers, or (C, 1, 1) tensors beside x, filled there: a copy from the host would wait for the device."""
        if self.normalization in RANGES:
            centre, deviation = RANGES[self.normalization]
            return centre * unit, deviation * unit
        means, deviations = (torch.stack([x.new_full((1, 1), value * unit) for value in values]) for values in (self.mean, self.std))
        return means, deviations


@dataclass(frozen=True, eq=False)
class Shard:
    """Labelled images of one owner; uint8 as loaded, or floats already in the classifier's range.

    Raises: DataError where images and labels do not fit each other.
    """

    images: Tensor                                                 # (n, C, H, W) uint8 or float
    labels: Tensor                                                 # (n,) int64
    scale: Scale

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or self.labels.shape != self.images.shape[:1]:
            raise DataError(f"images {tuple(self.images.shape)} and labels {tuple(self.labels.shape)} make no shard; wanted (n, C, H, W) and (n,)")
        if self.labels.dtype != torch.int64 or not (self.images.dtype == torch.uint8 or self.images.is_floating_point()):
            raise DataError(f"a shard of {self.images.dtype} images and {self.labels.dtype} labels; wanted uint8 or floats, and int64")

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Tensor | slice | None = None) -> Tensor:
        """Images as the classifier reads them, float (B, C, H, W): those at the indices (B,) int64, of a slice, or all."""
        if isinstance(indices, Tensor):
            return self.scale(self.images.index_select(0, indices.to(self.images.device)))
        return self.scale(self.images[indices] if indices is not None else self.images)

    def to(self, device: torch.device | str) -> "Shard":
        """The shard on a device; shares memory where it is there already."""
        moved = tree.to({"images": self.images, "labels": self.labels}, device)
        return replace(self, images=moved["images"], labels=moved["labels"])


def load(corpus: Corpus, owned: Sequence[np.ndarray], scale: Scale, device: torch.device | str) -> tuple[Shard, ...]:
    """Training images on a device, one Shard for each array of indices; one pass over the file serves all, where a pass per client would read it K times.

    Raises: DataError where the file is damaged.
    """
    indices, sizes = np.concatenate(owned), [len(own) for own in owned]
    images = torch.from_numpy(corpus.train_images(indices)).to(device).split(sizes)
    labels = torch.from_numpy(corpus.train_labels[indices]).to(device).split(sizes)
    return tuple(Shard(own, y, scale) for own, y in zip(images, labels, strict=True))


def iterate_epochs(shard: Shard, batch: int, epochs: int, stream: Stream, augmentation: Augmentation = PLAIN) -> Iterator[Tree]:
    """Shuffled batches {"x": float (B, C, H, W), "y": int64 (B,), "index": int64 (B,) in the shard} of a shard, every image once per epoch.

    The order follows from the stream alone, on any device. The last batch of an epoch may be smaller; one of a single image joins the batch
    before it, because BatchNorm has no variance of one value. Images are augmented anew in every epoch, before they are scaled; where the
    augmentation mixes labels, "y" is float32 (B, classes).
    """
    generator = stream.torch()
    for epoch in range(epochs):
        own = stream.branch(f"augmentation {epoch}")
        seen = replace(shard, images=augmentation.images(shard.images, own))
        order = torch.randperm(len(shard), generator=generator).to(shard.labels.device)
        for step, chosen in enumerate(order.split(list_batch_sizes(len(shard), batch))):
            x, y = augmentation.mix(seen.pixels(chosen), shard.labels.index_select(0, chosen), own.branch(f"batch {step}"))
            yield {"x": x, "y": y, "index": chosen}


def list_batch_sizes(total: int, batch: int) -> list[int]:
    """Sizes of the batches of one epoch; a last one of a single image joins the one before it."""
    sizes = [batch] * (total // batch) + [total % batch] * (total % batch > 0)
    return [*sizes[:-2], batch + 1] if batch > 1 and len(sizes) > 1 and sizes[-1] == 1 else sizes
