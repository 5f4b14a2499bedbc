"""mosaics: drawings of many small images side by side, real and synthetic ones, and pairs that lie close together."""
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcfl.report.canvas import WIDTH, Theme


def draw_samples(theme: Theme, real: np.ndarray, synthetic: np.ndarray, has: np.ndarray, owners: Sequence[str]) -> Figure:
    """Real (C, n, ch, H, W) beside synthetic (S, C, n, ch, H, W) uint8 images, one row per class; a class without images stays empty."""
    classes, shown = real.shape[:2]
    blocks = [_pictures(real, np.ones(classes, bool)), *(_pictures(images, known) for images, known in zip(synthetic, has, strict=True))]
    side = WIDTH * 0.92 / (len(blocks) * (shown + 0.35))
    figure = Figure(figsize=(WIDTH, 0.55 + min(side, 0.62) * classes))
    for index, (axes, block, title) in enumerate(zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks, ("real", *owners), strict=True)):
        _tiles(axes, block, title, classes, [str(c) for c in range(classes)] if index == 0 else [])
        if index == 0:
            axes.set_ylabel("class")
    return figure


def draw_pairs(theme: Theme, blocks: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Blocks side by side, by title: pairs of uint8 images (n, 2, ch, H, W), one pair a row, and their distances (n,)."""
    rows = max(len(distances) for _, distances in blocks.values())
    figure = Figure(figsize=(WIDTH, 0.55 + 0.62 * rows))
    for axes, (title, (images, distances)) in zip(figure.subplots(1, len(blocks), squeeze=False)[0], blocks.items(), strict=True):
        _tiles(axes, _pictures(images, np.ones(len(images), bool)), title, len(images), [f"{distance:.2f}" for distance in distances])
        axes.set_ylabel("distance")
        axes.set_anchor("N")
    return figure


def _tiles(axes: Axes, picture: np.ndarray, title: str, rows: int, labels: Sequence[str]) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks((np.arange(rows) + 0.5) * picture.shape[0] / rows - 0.5, labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _pictures(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    classes, shown, channels, height, width = images.shape
    canvas = np.zeros((classes, height + 1, shown, width + 1, 4), np.uint8)                            # transparent where nothing is
    pixels = np.moveaxis(images[:, :, :3] if channels >= 3 else images[:, :, [0, 0, 0]], 2, -1)      # (C, n, H, W, 3)
    canvas[:, :height, :, :width, :3] = np.swapaxes(pixels, 1, 2)
    canvas[known, :height, :, :width, 3] = 255
    return canvas.reshape(classes * (height + 1), shown * (width + 1), 4)
