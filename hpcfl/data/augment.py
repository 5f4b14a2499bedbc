"""Augmentation of training images: what an image becomes follows from a Stream and its place in the shard, not from the images beside it.

Every image has a row of uniform random numbers, and images that draw the same operation go through it together. torchvision's own policies draw once per
call; a call for each image takes 7 to 10 times as long (2,500 of 3x32x32 on a CPU).
"""
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcfl.errors import DataError
from hpcfl.streams import Stream

PAD = 4                                                            # crop_flip: pixels of black on each side
BINS = 10                                                          # levels of a magnitude, in AutoAugment and AugMix
SEVERITY, CHAINS, DEPTH = 3, 3, 3                                  # AugMix: levels in use, chains, most operations of a chain
BLOCK = 4096                                                       # images at a time: AugMix takes about 12 bytes per pixel and channel


@dataclass(frozen=True)
class Operation:
    """What a policy may do to uint8 images (B, C, H, W): `act(v2.functional, images, magnitude, interpolation)`.

    The magnitudes of the levels 0 .. BINS - 1 run evenly from `first` to `last`; `signed` ones may turn negative.
    """

    act: Callable[[Any, Tensor, float, str], Tensor]
    first: float = 0.0
    last: float = 0.0
    signed: bool = False

    def __call__(self, images: Tensor, level: int, negative: bool, interpolation: str) -> Tensor:
        """The images after the operation."""
        from torchvision.transforms.v2 import functional  # imported here: two seconds of start-up that other runs do not need
        magnitude = float(torch.linspace(self.first, self.last, BINS)[level])
        return self.act(functional, images, -magnitude if negative else magnitude, interpolation)


def _shift_or_shear(v2: Any, images: Tensor, interpolation: str, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Images shifted by pixels, or sheared about the upper left corner by slopes."""
    degrees = [math.degrees(math.atan(slope)) for slope in shear]
    return v2.affine(images, 0.0, list(shift), 1.0, degrees, interpolation=interpolation, center=[0, 0] if any(shear) else None)


AUTOAUGMENT = {                                                    # magnitudes of Cubuk et al., table 6; shifts in sides of the image, angles in degrees
    "ShearX": Operation(lambda v2, x, m, how: _shift_or_shear(v2, x, how, shear=(m, 0.0)), 0.0, 0.3, signed=True),
    "ShearY": Operation(lambda v2, x, m, how: _shift_or_shear(v2, x, how, shear=(0.0, m)), 0.0, 0.3, signed=True),
    "TranslateX": Operation(lambda v2, x, m, how: _shift_or_shear(v2, x, how, shift=(int(m * x.shape[3]), 0)), 0.0, 150 / 331, signed=True),
    "TranslateY": Operation(lambda v2, x, m, how: _shift_or_shear(v2, x, how, shift=(0, int(m * x.shape[2]))), 0.0, 150 / 331, signed=True),
    "Rotate": Operation(lambda v2, x, m, how: v2.rotate(x, m, interpolation=how), 0.0, 30.0, signed=True),
    "Brightness": Operation(lambda v2, x, m, how: v2.adjust_brightness(x, 1.0 + m), 0.0, 0.9, signed=True),
    "Color": Operation(lambda v2, x, m, how: v2.adjust_saturation(x, 1.0 + m), 0.0, 0.9, signed=True),
    "Contrast": Operation(lambda v2, x, m, how: v2.adjust_contrast(x, 1.0 + m), 0.0, 0.9, signed=True),
    "Sharpness": Operation(lambda v2, x, m, how: v2.adjust_sharpness(x, 1.0 + m), 0.0, 0.9, signed=True),
    "Posterize": Operation(lambda v2, x, m, how: v2.posterize(x, round(m)), 8.0, 4.0),                 # bits that stay
    "Solarize": Operation(lambda v2, x, m, how: v2.solarize(x, 255.0 * m), 1.0, 0.0),
    "AutoContrast": Operation(lambda v2, x, m, how: v2.autocontrast(x)),
    "Equalize": Operation(lambda v2, x, m, how: v2.equalize(x)),
    "Invert": Operation(lambda v2, x, m, how: v2.invert(x)),
}
AUGMIX = {name: operation for name, operation in AUTOAUGMENT.items() if name != "Invert"} | {
    "TranslateX": replace(AUTOAUGMENT["TranslateX"], last=1 / 3), "TranslateY": replace(AUTOAUGMENT["TranslateY"], last=1 / 3),
    "Posterize": replace(AUTOAUGMENT["Posterize"], first=4.0, last=0.0)}
CIFAR10 = (                                                        # Cubuk et al., table 7: two operations with probability and level, one pair per image
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)), (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)), (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)), (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)), (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)), (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)), (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)), (("Color", 0.7, 7), ("TranslateX", 0.5, 8)), (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)), (("Brightness", 0.9, 6), ("Color", 0.2, 8)), (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)), (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)), (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)), (("Brightness", 0.1, 3), ("Color", 0.7, 0)), (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)), (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)), (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)))


def crop_flip(images: Tensor, draws: np.ndarray) -> Tensor:
    """A crop of the size of each image from the image with PAD pixels of black around it, mirrored for half of the images: the usual pipeline of CIFAR."""
    count, channels, height, width = images.shape
    top, left = _to_whole(draws[:, :2], 2 * PAD + 1).T
    rows = torch.from_numpy(top[:, None] + np.arange(height)).to(images.device)                                           # (B, H)
    columns = torch.from_numpy(left[:, None] + np.where(draws[:, 2:] < 0.5, np.arange(width)[::-1], np.arange(width))).to(images.device)       # (B, W)
    places = (rows[:, :, None] * (width + 2 * PAD) + columns[:, None]).view(count, 1, -1)
    padded = F.pad(images, (PAD, PAD, PAD, PAD)).flatten(2)
    return padded.gather(2, places.expand(-1, channels, -1)).view(images.shape)


def autoaugment(images: Tensor, draws: np.ndarray) -> Tensor:
    """AutoAugment (Cubuk et al., CVPR 2019, arXiv 1805.09501) with the policy learned on CIFAR-10: one of 25 pairs of operations for each image."""
    names = list(AUTOAUGMENT)
    pair = _to_whole(draws[:, 0], len(CIFAR10))
    for turn in (0, 1):
        operation = np.array([names.index(each[turn][0]) for each in CIFAR10])[pair]
        chance, level = (np.array([each[turn][column] for each in CIFAR10])[pair] for column in (1, 2))
        acts, negative = draws[:, 1 + 2 * turn] < chance, draws[:, 2 + 2 * turn] < 0.5
        images = _change(images, AUTOAUGMENT, operation, level, negative, acts, "nearest")
    return images


def augmix(images: Tensor, draws: np.ndarray) -> Tensor:
    """AugMix (Hendrycks et al., ICLR 2020, arXiv 1912.02781), without its consistency loss: each image mixed with chains of operations on it.

    (1 - m) x + m sum_i w_i chain_i(x) with m ~ Beta(1, 1) and w ~ Dirichlet(1, 1, 1), each chain of one to three operations; severity and operations as in
    torchvision, but fractions of the result are rounded: cut off, as there, they make every image darker by half a level.
    """
    m, weights, depth, steps = np.split(draws, (1, 1 + CHAINS, 1 + 2 * CHAINS), axis=1)
    steps = steps.reshape(len(images), CHAINS, DEPTH, 3)
    exponential = -np.log1p(-weights)                                # (B, CHAINS): normalised, they are Dirichlet(1, 1, 1)
    portions = np.concatenate([1 - m, m * exponential / exponential.sum(1, keepdims=True)], axis=1)
    shares = torch.from_numpy(portions.astype(np.float32)).to(images.device)[:, :, None, None, None]         # (B, 1 + CHAINS, 1, 1, 1)
    mixed = shares[:, 0] * images
    for chain in range(CHAINS):
        changed = images
        for step in range(DEPTH):
            operation, level, sign = steps[:, chain, step].T
            changed = _change(changed, AUGMIX, _to_whole(operation, len(AUGMIX)), _to_whole(level, SEVERITY), sign < 0.5,
                              step <= _to_whole(depth[:, chain], DEPTH), "bilinear")
        mixed.addcmul_(shares[:, 1 + chain], changed.to(mixed.dtype))
    return mixed.round_().clamp_(0, 255).to(torch.uint8)


OF_IMAGES = {"crop_flip": (crop_flip, 3), "augmix": (augmix, 1 + 2 * CHAINS + 3 * CHAINS * DEPTH), "autoaugment": (autoaugment, 5)}    # and draws per image
OF_BATCHES = {"mixup": "MixUp", "cutmix": "CutMix"}                # torchvision's names


@dataclass(frozen=True)
class Augmentation:
    """What training does to its images, by the words of `training.augment` in their order: those of OF_IMAGES, then at most one of OF_BATCHES."""

    words: tuple[str, ...] = ()
    classes: int = 0                                               # for soft labels
    alpha: float = 1.0                                             # mixup and cutmix: the share of an image is drawn from Beta(alpha, alpha)

    @property
    def mixes_labels(self) -> bool:
        """Whether labels become (B, classes)."""
        return self != self.unmixed

    @property
    def unmixed(self) -> "Augmentation":
        """The Augmentation without the words that mix images."""
        return replace(self, words=tuple(word for word in self.words if word in OF_IMAGES))

    def images(self, images: Tensor, stream: Stream) -> Tensor:
        """All images of a shard (n, C, H, W) uint8, each augmented by itself; image i follows from the stream and i alone.

        Raises: DataError for images that are uint8 no more.
        """
        for word in self.words:
            if word in OF_IMAGES and len(images):
                images = self._augment(word, images, stream.branch(word).numpy())
        return images

    def _augment(self, word: str, images: Tensor, generator: np.random.Generator) -> Tensor:
        if images.dtype != torch.uint8:
            raise DataError(f"training.augment = {list(self.words)}: '{word}' of {images.dtype} images; wanted uint8, before they are scaled")
        augment, count = OF_IMAGES[word]
        return torch.cat([augment(block, generator.random((len(block), count))) for block in images.split(BLOCK)])

    def mix(self, x: Tensor, y: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """A batch (B, C, H, W) and its labels (B,) as they are, or each image mixed with the one before it, and labels (B, classes).

        mixup (Zhang et al., ICLR 2018, arXiv 1710.09412): lambda x + (1 - lambda) x'. cutmix (Yun et al., ICCV 2019, arXiv 1905.04899): a box of x' in x.
        One lambda and one box per batch.
        """
        for word in self.words:
            if word in OF_BATCHES:
                with stream.branch(word).seeding():
                    x, y = _build_mixer(OF_BATCHES[word], self.classes, self.alpha)(x, y)
        return x, y


@functools.cache
def _build_mixer(name: str, classes: int, alpha: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from torchvision.transforms import v2
    return getattr(v2, name)(num_classes=classes, alpha=alpha)


def _change(images: Tensor, operations: Mapping[str, Operation], operation: np.ndarray, level: np.ndarray, negative: np.ndarray, acts: np.ndarray,
            interpolation: str) -> Tensor:
    """The images after one operation each, given by its number, level and sign, (B,) each; where it does not act, as they were. Like cases go together."""
    table = list(operations.values())
    graded, signed = (np.array(flags)[operation] for flags in ([each.first != each.last for each in table], [each.signed for each in table]))
    codes = np.where(acts, (operation * BINS + level * graded) * 2 + (negative & signed), -1)
    order = np.argsort(codes, kind="stable")
    found, starts = np.unique(codes[order], return_index=True)
    there, back = (torch.from_numpy(each).to(images.device) for each in (order, np.argsort(order)))
    blocks = images.index_select(0, there).tensor_split(starts[1:].tolist())
    changed = [block if code < 0 else table[code // (2 * BINS)](block, code // 2 % BINS, bool(code % 2), interpolation)
               for code, block in zip(found.tolist(), blocks, strict=True)]
    return torch.cat(changed).index_select(0, back)


def _to_whole(uniform: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers below `count` from uniform ones in [0, 1)."""
    return (uniform * count).astype(np.int64)
