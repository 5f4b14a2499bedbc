"""The canvas: files of figures are the same bytes each time, whatever a user's matplotlib is set to, and axes are readable in both themes."""
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from hpcfl.report import canvas


def draw(theme: canvas.Theme) -> Figure:
    """A line with a label."""
    figure, axes = canvas.start_figure(2.0)
    axes.plot([1, 2, 3], [1, 4, 9], color=theme.series[0], label="costs 5$ or $6")
    canvas.label_rounds(axes, 3, "loss")
    canvas.add_legend(figure, axes)
    return figure


def luminance(colour: str) -> float:
    """WCAG 2, relative luminance of "#rrggbb"."""
    values = [int(colour[start:start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    """WCAG 2, from 1 (none) to 21 (black on white)."""
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("write", [canvas.to_png, canvas.to_svg])
def test_a_file_is_the_same_bytes_each_time_whatever_matplotlib_is_set_to(write):
    first = write(draw)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert write(draw) == first
        assert matplotlib.rcParams["font.size"] == 30, "a user's settings stay as they are"


def test_a_png_is_of_the_width_in_dots_and_each_theme_has_its_surface():
    light, dark = canvas.to_png(draw), canvas.to_png(draw, canvas.DARK)
    for image in (light, dark):
        width, height = (int.from_bytes(image[start:start + 4], "big") for start in (16, 20))
        assert image[:4] == b"\x89PNG" and (width, height) == (canvas.WIDTH * canvas.DPI, 2 * canvas.DPI)
    assert light != dark


def test_text_of_an_svg_is_text_and_a_dollar_sign_is_no_formula():
    text = canvas.to_svg(draw).decode()
    assert "costs 5$ or $6" in text and ">loss</text>" in text and "hpcfl" in text


@pytest.mark.parametrize("theme", [canvas.LIGHT, canvas.DARK])
def test_words_and_curves_stand_out_from_the_surface(theme):
    assert contrast(theme.ink, theme.surface) > 12 and contrast(theme.muted, theme.surface) > 4.5
    assert min(contrast(colour, theme.surface) for colour in theme.series) > 2
    ramp = [luminance(colour) for colour in theme.ramp]
    assert ramp in (sorted(ramp), sorted(ramp, reverse=True)), "from little to much without a turn"


@pytest.mark.parametrize(("colour", "ink"), [((1, 1, 1, 1), "#10161d"), ((0, 0, 0), "#ffffff"), ((0.0, 0.2, 0.6), "#ffffff"), ((0.9, 0.6, 0.0), "#10161d")])
def test_numbers_in_cells_are_black_or_white_as_is_easier_to_read(colour, ink):
    assert canvas.choose_ink(colour) == ink
    assert contrast(ink, "#" + "".join(f"{round(255 * value):02x}" for value in colour[:3])) > 4


def test_ranges_leave_out_what_is_missing():
    values = np.array([[1.0, np.nan, 3.0], [np.nan, 5.0, 4.0]])
    assert canvas.lowest(values).tolist() == [1.0, 4.0] and canvas.highest(values).tolist() == [3.0, 5.0]


def test_an_axis_of_rounds_has_whole_numbers_and_room_at_both_ends():
    figure, axes = canvas.start_figure(2.0)
    canvas.label_rounds(axes, 3, "loss")
    figure.canvas.draw()
    assert axes.get_xticks().tolist() == [1, 2, 3] and axes.get_xlim() == (-0.5, 4.5) and axes.get_xlabel() == "round"
    canvas.label_rounds(axes, 400, "loss")
    figure.canvas.draw()
    assert all(tick == int(tick) for tick in axes.get_xticks()) and axes.get_xlim() == (-7.0, 408.0)


@pytest.mark.parametrize(("clients", "labels"), [(3, 3), (40, 40), (41, 21), (1000, 40)])
def test_of_very_many_clients_every_so_many_has_a_label(clients, labels):
    _, axes = canvas.start_figure(2.0)
    canvas.label_clients(axes, [f"client {client}" for client in range(clients)])
    assert len(axes.get_yticks()) == labels and axes.get_ylim()[0] > axes.get_ylim()[1], "the first client is at the top"


def test_rows_grow_up_to_a_page():
    assert canvas.choose_height(1) == canvas.choose_height(3) == 3 * canvas.GROWS and canvas.choose_height(1000) == 8.5
