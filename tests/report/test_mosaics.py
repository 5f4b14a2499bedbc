"""Mosaics: every image stands in its row and column, and what is not there is left empty."""
import numpy as np
import pytest
from matplotlib.figure import Figure

from hpcfl.report import canvas, mosaics


def drawn(figure: Figure) -> list[np.ndarray]:
    """The arrays that a figure's axes show, each (H, W, 4)."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_real_and_synthetic_images_stand_in_the_row_of_their_class(channels):
    real = np.arange(3 * 2, dtype=np.uint8).reshape(3, 2, 1, 1, 1) * np.ones((1, 1, channels, 4, 5), np.uint8)     # class c, image n: all pixels 2 c + n
    figure = mosaics.draw_samples(canvas.LIGHT, real, 100 + real[None], np.array([[True, False, True]]), ["synthetic, client 4"])
    assert [axes.get_title() for axes in figure.axes] == ["real", "synthetic, client 4"] and figure.axes[0].get_ylabel() == "class"
    for block, first in zip(drawn(figure), (0, 100), strict=True):
        assert block.shape == (3 * 5, 2 * 6, 4)
        for class_ in (0, 2):
            for image in (0, 1):
                tile = block[5 * class_:5 * class_ + 4, 6 * image:6 * image + 5]
                assert (tile == [first + 2 * class_ + image] * 3 + [255]).all()
    synthetic = drawn(figure)[1]
    assert (synthetic[5:9, :, 3] == 0).all() and (synthetic[4, :, 3] == 0).all(), "a class without images, and the gap between rows, are transparent"


def test_pairs_stand_in_rows_with_their_distances():
    images = np.array([10, 20, 30, 40], np.uint8).reshape(2, 2, 1, 1, 1) * np.ones((1, 1, 1, 3, 3), np.uint8)
    figure = mosaics.draw_pairs(canvas.DARK, {"a": (images, np.array([0.5, 1.25])), "b": (images[:1], np.array([2.0]))})
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["0.50", "1.25"] and [label.get_text() for label in second.get_yticklabels()] == ["2.00"]
    block = drawn(figure)[0]
    assert [block[4 * row, 4 * column, 0] for row in (0, 1) for column in (0, 1)] == [10, 20, 30, 40]
    assert canvas.to_png(lambda theme: figure)[:4] == b"\x89PNG"
