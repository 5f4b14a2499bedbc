"""canvas: what all figures share: their size, the colours of a light and a dark theme that hold for colour-blind eyes, files of them, and their axes."""
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

WIDTH = 6.0                                                        # inches: half a laptop page, and ten-point text stays readable on a phone
DPI = 160
NUMBERS_UP_TO = (12, 24)                                           # classes, clients: larger heat maps carry no numbers
LABELS_UP_TO = 40                                                  # rows with a label each
GROWS = 0.21                                                       # inches per client


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance. `series` are Okabe and Ito's colours, lightened for the dark surface; `ramp` runs from little to much."""

    surface: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    ramp: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1c2430", "#5b6675", "#e3e7ec", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d5663"),
              ("#f0f5fa", "#b5d4ea", "#62a8d6", "#1f75b0", "#08406f"))
DARK = Theme("#161b22", "#e6eaf0", "#9aa5b4", "#2c343f", ("#4aa8e0", "#f0853f", "#2fbf93", "#e096c1", "#f0b640", "#9ad2f2", "#a9b3c0"),
             ("#1d2631", "#1d4b74", "#2f7fb8", "#74b8e6", "#d8eefb"))
Drawing = Callable[[Theme], Figure]


def to_png(draw: Drawing, theme: Theme = LIGHT) -> bytes:
    """A drawing as a PNG file of WIDTH inches at DPI."""
    return _file(draw, theme, "png", {"Software": "hpcfl"})


def to_svg(draw: Drawing, theme: Theme = LIGHT) -> bytes:
    """A drawing as an SVG file of WIDTH inches, the same bytes each time, its text as text."""
    return _file(draw, theme, "svg", {"Date": None, "Creator": "hpcfl"})


def _file(draw: Drawing, theme: Theme, kind: str, metadata: Mapping[str, str | None]) -> bytes:
    settings = {"figure.facecolor": theme.surface, "axes.facecolor": theme.surface, "savefig.facecolor": theme.surface, "text.color": theme.ink,
                "axes.labelcolor": theme.ink, "axes.edgecolor": theme.muted, "xtick.color": theme.muted, "ytick.color": theme.muted,
                "grid.color": theme.grid, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
                "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False, "font.size": 10,
                "hatch.color": theme.muted, "hatch.linewidth": 0.6, "figure.constrained_layout.use": True, "axes.axisbelow": True,
                "svg.hashsalt": "hpcfl", "svg.fonttype": "none",
                "text.parse_math": False}                             # a dollar sign in a name is a dollar sign
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()                                    # a user's matplotlibrc must not change a report
        matplotlib.rcParams.update(settings)  # type: ignore[arg-type]  # its stubs have the names of settings as a type
        draw(theme).savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def start_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of WIDTH with one pair of axes; its height is in inches."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots()


def lowest(values: np.ndarray) -> np.ndarray:
    """The lowest of each row that is not NaN: (R, K) -> (R,)."""
    return np.fmin.reduce(values, axis=1)


def highest(values: np.ndarray) -> np.ndarray:
    """The highest of each row that is not NaN: (R, K) -> (R,)."""
    return np.fmax.reduce(values, axis=1)


def choose_height(count: int, each: float = GROWS) -> float:
    """How high so many rows are together, in inches, up to a page."""
    return min(max(3, count) * each, 8.5)


def label_rounds(axes: Axes, rounds: float, label: str) -> None:
    """An x axis of rounds, whole numbers from 1, and a y axis with its label."""
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    room = max(0.5, 0.02 * rounds, (6 - rounds) / 2)               # few rounds do not fill the width
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True) if rounds >= 6 else FixedLocator(range(1, int(rounds) + 1)))
    axes.set_xlim(1 - room, rounds + room)
    axes.grid(axis="y")


def add_legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """A legend above the axes, where anything in them has a label."""
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=1.2, borderaxespad=0.3)


def label_clients(axes: Axes, labels: Sequence[str]) -> None:
    """A y axis with a row for each client, from the top; of very many every so many has its label."""
    step = -(-len(labels) // LABELS_UP_TO) if labels else 1
    axes.set_yticks(range(0, len(labels), step), labels[::step])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def label_cells(axes: Axes, labels: Sequence[str], classes: int) -> None:
    """Axes of a matrix of clients by classes."""
    label_clients(axes, labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(-0.5, classes - 0.5)
    if classes <= 2 * NUMBERS_UP_TO[0]:
        axes.set_xticks(range(classes))
    axes.tick_params(length=0)
    axes.set_xlabel("class")
    axes.spines[:].set_visible(False)


def make_ramp(theme: Theme) -> Colormap:
    """The theme's colours from little to much; what is not known has the colour of the surface."""
    return LinearSegmentedColormap.from_list("ramp", theme.ramp).with_extremes(bad=theme.surface)


def choose_ink(colour: Sequence[float]) -> str:
    """Black or white, whichever is easier to read on a colour (red, green, blue, ...) in [0, 1]."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]                           # WCAG 2, relative luminance
    return "#10161d" if luminance > 0.19 else "#ffffff"            # where both contrasts are equal
