"""figures: drawings of arrays, one function per figure and no knowledge of files."""
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcfl.report import canvas
from hpcfl.report.canvas import LABELS_UP_TO, NUMBERS_UP_TO, Theme
from hpcfl.report.recording import average
from hpcfl.wording import choose_byte_unit

BUBBLES_UP_TO = 1200                                               # cells; a larger partition is a heat map
PANELS_UP_TO = 9                                                   # parameters with a panel each; more are rows of a heat map
APART = 20                                                         # ends of curves further apart than this stand on a logarithmic axis
ROOM, LETTER = 360.0, 4.9                                          # points: the width of the axes, a letter of 8 points
LEGEND = (34, 76)                                                  # letters of labels of which two, or one, fit side by side; longer ones are wrapped


def draw_accuracy(theme: Theme, lines: Mapping[str, tuple[int, np.ndarray, np.ndarray]], chance: float, phases: Sequence[tuple[int, str]]) -> Figure:
    """Accuracy per round: {name: (index of its colour, rounds (E,), percent (E, K))}; colour 0 shows its clients and their range, others a mean."""
    figure, axes = canvas.start_figure(3.6)
    for name, (index, rounds, values) in lines.items():
        colour = theme.series[index]
        if index == 0:
            axes.fill_between(rounds, canvas.lowest(values), canvas.highest(values), color=colour, alpha=0.14, linewidth=0, label="min to max of the clients")
            axes.plot(rounds, values, color=colour, alpha=max(0.12, 1.1 / max(1, values.shape[1]) ** 0.5), linewidth=0.8,
                      marker="_" if len(rounds) == 1 else None, markersize=12)
        axes.plot(rounds, average(values, 1), color=colour, linewidth=2.2 if index == 0 else 1.8, linestyle=("-", "--", "-.", ":")[index % 4],
                  marker="o" if len(rounds) <= 25 else None, markersize=4, label=name, zorder=4 + index * 0.1)
    axes.axhline(chance, color=theme.muted, linewidth=1, linestyle=(0, (1, 2)), label=f"chance ({chance:.3g} %)")
    canvas.label_rounds(axes, max(rounds.max(initial=1) for _, rounds, _ in lines.values()), "accuracy (%)")
    axes.set_ylim(bottom=0)
    if len(phases) > 1:
        _phases(theme, axes, phases)
    canvas.add_legend(figure, axes, columns=2)
    return figure


def _phases(theme: Theme, axes: Axes, phases: Sequence[tuple[int, str]]) -> None:
    """Where each phase begins, with its name in the first row below the top in which it runs into no other name and not out of the figure."""
    (low, high), ends = axes.get_xlim(), list[float]()             # points from the left at which each row's last name ends
    for start, name in phases:
        at, wide = (start + 0.5 - low) / (high - low) * ROOM, 8 + LETTER * len(name)
        before = at + wide > ROOM                                  # the name stands left of its line
        left = at - wide if before else at
        row = next((row for row, end in enumerate(ends) if end <= left), len(ends))
        ends[row:row + 1] = [left + wide]
        axes.axvline(start + 0.5, color=theme.muted, linewidth=0.8)
        axes.annotate(name, (start + 0.5, 1), (-3 if before else 3, -10 * row), xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
                      ha="right" if before else "left", fontsize=8, color=theme.muted, zorder=5,
                      bbox={"facecolor": theme.surface, "edgecolor": "none", "alpha": 0.75, "pad": 0.5})


def draw_overlay(theme: Theme, groups: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], against: str) -> Figure:
    """Runs over each other: {label: [(x (E,), mean accuracy in percent (E,)), one per seed]}; several seeds become thin lines and their mean.

    A dotted line leads from each end to the right: what was reached once and for nothing more, as by a method of one exchange, stays in sight.
    """
    labels = {label: textwrap.fill(label + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""), LEGEND[1]) for label, runs in groups.items()}
    columns = 2 if max(map(len, labels.values()), default=0) <= LEGEND[0] else 1
    figure, axes = canvas.start_figure(3.3 + 0.17 * -(-sum(label.count("\n") + 1 for label in labels.values()) // columns))
    unit, factor = choose_byte_unit(max((x.max(initial=0) for runs in groups.values() for x, _ in runs), default=0)) if against == "bytes" else ("", 1)
    for index, (label, runs) in enumerate(groups.items()):
        style: dict[str, Any] = {"color": theme.series[index % len(theme.series)], "linestyle": ("-", "--", ":")[index // len(theme.series) % 3]}
        for x, y in runs if len(runs) > 1 else ():
            axes.plot(x / factor, y, **style, linewidth=0.8, alpha=0.45)
        x, y = np.mean([x for x, _ in runs], 0) / factor, np.mean([y for _, y in runs], 0)
        axes.plot(x, y, **style, linewidth=2, marker="o" if len(x) <= 25 else None, markersize=4, label=labels[label], clip_on=False, zorder=3)
        axes.plot(x[-1:], y[-1:], color=style["color"], marker="osD^v"[index % 5], markersize=8, clip_on=False, zorder=4)
        axes.annotate("", (1, y[-1]), (x[-1], y[-1]), ("axes fraction", "data"), "data",
                      arrowprops={"arrowstyle": "-", "color": style["color"], "linestyle": ":", "linewidth": 1, "shrinkA": 0, "shrinkB": 0})
    if against == "bytes":
        axes.set_xlabel(f"simulated bytes so far, up and down, all clients ({unit})")
        axes.set_ylabel("mean accuracy (%)")
        axes.set_xlim(left=0)
        axes.grid(axis="y")
        spent = [x[-1] / factor for runs in groups.values() for x, _ in runs if x[-1] > 0]
        if spent and max(spent) > APART * min(spent):
            axes.set_xscale("symlog", linthresh=min(spent), linscale=0.6)
            axes.xaxis.set_major_formatter("{x:g}")
    else:
        canvas.label_rounds(axes, max((x.max(initial=1) for runs in groups.values() for x, _ in runs), default=1), "mean accuracy (%)")
    axes.set_ylim(bottom=0)
    canvas.add_legend(figure, axes, columns)
    return figure


def draw_before_after(theme: Theme, labels: Sequence[str], points: Mapping[str, tuple[int, np.ndarray]]) -> Figure:
    """One row per client with a point for each of {name: (index of its colour, percent (K,))}, joined by a line; dashed lines are the means."""
    figure, axes = canvas.start_figure(1.5 + canvas.choose_height(len(labels)))
    y, stacked = np.arange(len(labels)), np.stack([values for _, values in points.values()])                             # (points, K)
    axes.hlines(y, canvas.lowest(stacked.T), canvas.highest(stacked.T), color=theme.muted, alpha=0.6, linewidth=1.6 if len(labels) <= LABELS_UP_TO else 0.7)
    for name, (index, values) in points.items():
        colour, marker = theme.series[index], "osD"[index]
        axes.axvline(average(values, 0), color=colour, linewidth=1.1, linestyle=(0, (4, 3)), alpha=0.8, zorder=0)
        axes.scatter(values, y, s=38 if len(labels) <= LABELS_UP_TO else 13, color=colour, marker=marker, linewidth=0.8, edgecolor=theme.surface,
                     label=f"{name} (mean {average(values, 0):.1f} %)", zorder=3)
    canvas.label_clients(axes, labels)
    axes.set_xlabel("accuracy (%)")
    axes.grid(axis="x")
    canvas.add_legend(figure, axes, columns=1 if len(points) < 3 else 2)
    return figure


def draw_recall(theme: Theme, values: np.ndarray, absent: np.ndarray, labels: Sequence[str]) -> Figure:
    """Heat map of percent (K, C), a dot in the cells of classes the client has no training sample of unless there are too many to see."""
    figure, axes = canvas.start_figure(1.7 + canvas.choose_height(len(labels), 0.25))
    ramp = canvas.make_ramp(theme)
    image = axes.imshow(values, cmap=ramp, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    small = values.shape[1] <= NUMBERS_UP_TO[0] and values.shape[0] <= NUMBERS_UP_TO[1]
    for client, class_ in np.argwhere(np.isfinite(values)) if small else ():
        axes.text(class_, client, f"{values[client, class_]:.0f}", ha="center", va="center", fontsize=8,
                  color=canvas.choose_ink(ramp(values[client, class_] / 100)))
    if absent.size <= BUBBLES_UP_TO:
        rows, columns = np.nonzero(absent)
        axes.scatter(columns + (0.36 if small else 0), rows - (0.3 if small else 0), s=12 if small else 4, color=theme.series[4], linewidth=0,
                     label="class absent from the client's training data")
    canvas.label_cells(axes, labels, values.shape[1])
    canvas.add_legend(figure, axes)
    bar = figure.colorbar(image, ax=axes, location="right", fraction=0.045, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("recall on the test set (%)")
    return figure


def draw_losses(theme: Theme, series: Mapping[str, np.ndarray]) -> Figure:
    """A panel per quantity of {name: (R, K)}: mean over the clients that took part, and their range; logarithmic where values span decades."""
    columns = min(2, len(series))
    figure = Figure(figsize=(canvas.WIDTH, 0.4 + (3.0 if columns == 1 else 1.9) * -(-len(series) // columns)))
    panels = figure.subplots(-(-len(series) // columns), columns, squeeze=False).ravel()
    for axes, (name, values) in zip(panels, series.items(), strict=False):
        rounds = np.flatnonzero(np.isfinite(values).any(1)) + 1
        seen = values[rounds - 1]                                                                      # (rounds that measured it, K)
        axes.fill_between(rounds, canvas.lowest(seen), canvas.highest(seen), color=theme.series[0], alpha=0.18, linewidth=0)
        if len(rounds) == 1:
            axes.vlines(rounds, canvas.lowest(seen), canvas.highest(seen), color=theme.series[0], alpha=0.35, linewidth=6)       # a band needs two rounds
        axes.plot(rounds, average(seen, 1), color=theme.series[0], linewidth=1.8, marker="o" if len(rounds) <= 12 else None, markersize=3.5)
        canvas.label_rounds(axes, len(values), "")
        axes.set_title(name.replace("_", " "))
        if seen.size and np.nanmin(seen) > 0 and np.nanmax(seen) > 30 * np.nanmin(seen):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")                # the default writes formulas
            axes.yaxis.set_minor_formatter("")
        elif seen.size and np.nanmin(seen) >= 0:
            axes.set_ylim(0, 1.08 * np.nanmax(seen) or 1)
        axes.set_xlabel("")
    for axes in panels[len(series):]:
        axes.set_visible(False)
    figure.supxlabel("round", fontsize=10)
    return figure


def draw_negatives(theme: Theme, paths: Sequence[str], sizes: Sequence[str], values: np.ndarray) -> Figure:
    """Percent of negative weights, (R, paths, sizes): a panel per parameter over rounds, or of many a heat map of the last round that has them."""
    measured = np.flatnonzero(np.isfinite(values).any((1, 2)))
    return (_negative_panels if len(paths) <= PANELS_UP_TO else _negative_map)(theme, paths, sizes, values, measured)


def _negative_panels(theme: Theme, paths: Sequence[str], sizes: Sequence[str], values: np.ndarray, measured: np.ndarray) -> Figure:
    columns = min(3, len(paths))
    figure = Figure(figsize=(canvas.WIDTH, 0.9 + (2.6 if columns < 3 else 1.7) * -(-len(paths) // columns)))
    panels = figure.subplots(-(-len(paths) // columns), columns, squeeze=False, sharey=True).ravel()
    for layer, (axes, path) in enumerate(zip(panels, paths, strict=False)):
        for index, size in enumerate(sizes):
            axes.plot(measured + 1, values[measured, layer, index], color=theme.series[index % len(theme.series)], linewidth=1.5 if index else 2.2,
                      linestyle=("-", "--", "-.", ":")[index % 4], marker="o" if len(measured) <= 12 else None, markersize=3.5,
                      label=None if layer else size)
        canvas.label_rounds(axes, len(values), "negative (%)" if layer % columns == 0 else "")
        axes.set_title(path, fontsize=9)
        axes.set_xlabel("")
    panels[0].set_ylim(0, 1.08 * np.nanmax(values, initial=0) or 1)
    for axes in panels[len(paths):]:
        axes.set_visible(False)
    figure.supxlabel("round", fontsize=10)
    canvas.add_legend(figure, panels[0])
    return figure


def _negative_map(theme: Theme, paths: Sequence[str], sizes: Sequence[str], values: np.ndarray, measured: np.ndarray) -> Figure:
    shown = values[measured[-1]] if len(measured) else np.full(values.shape[1:], np.nan)              # (paths, sizes)
    each = np.clip(9.0 / len(paths), 0.05, canvas.GROWS)           # inches a row
    figure, axes = canvas.start_figure(1.2 + each * len(paths))
    ramp, low, high = canvas.make_ramp(theme), np.nanmin(shown, initial=100), np.nanmax(shown, initial=0)
    image = axes.imshow(shown, cmap=ramp, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    text = min(8.0, 60 * each)                                     # points: rows are 72 each high
    step = int(np.ceil(5.5 / text))                                # smaller is not legible: every so many rows a label, no numbers
    for layer, index in np.argwhere(np.isfinite(shown)) if step == 1 and len(sizes) <= NUMBERS_UP_TO[0] else ():
        axes.text(index, layer, f"{shown[layer, index]:.1f}", ha="center", va="center", fontsize=text,
                  color=canvas.choose_ink(ramp((shown[layer, index] - low) / max(high - low, 1e-9))))
    axes.set_yticks(range(0, len(paths), step), paths[::step], fontsize=text * step)
    axes.set_xticks(range(len(sizes)), sizes, rotation=0 if len(sizes) <= 3 else 50, ha="center" if len(sizes) <= 3 else "left")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, location="right", fraction=0.045, pad=0.02, label="negative weights (%)")
    bar.outline.set_visible(False)
    return figure


def draw_server(theme: Theme, notes: Mapping[str, np.ndarray], dilated: np.ndarray) -> Figure:
    """Accuracies in percent on the server's validation part: {name: (R,)}, the first one drawn strongest; dilated models (R, K), mean and range."""
    figure, axes = canvas.start_figure(3.6)
    rounds = np.flatnonzero(np.isfinite(dilated).any(1))
    if len(rounds):
        seen = dilated[rounds]
        axes.fill_between(rounds + 1, canvas.lowest(seen), canvas.highest(seen), color=theme.series[1], alpha=0.16, linewidth=0,
                          label="dilation, min to max of clients")
        if len(rounds) == 1:
            axes.vlines(rounds + 1, canvas.lowest(seen), canvas.highest(seen), color=theme.series[1], alpha=0.35, linewidth=6)       # a band needs two rounds
        axes.plot(rounds + 1, average(seen, 1), color=theme.series[1], linewidth=1.8, linestyle="-.", marker="s" if len(rounds) <= 25 else None,
                  markersize=3.5, label="dilation, mean of clients")
    colours = (theme.series[0], *theme.series[2:])
    for index, (name, values) in enumerate(notes.items()):
        at = np.flatnonzero(np.isfinite(values))
        axes.plot(at + 1, values[at], color=colours[index % len(colours)], linewidth=1.5 if index else 2.2,
                  linestyle=("-", "--", ":")[min(index, 1 + index % 2)], marker="o" if len(at) <= 25 else None, markersize=4, label=name)
    canvas.label_rounds(axes, len(dilated), "accuracy (%)")
    axes.set_ylim(bottom=0)
    canvas.add_legend(figure, axes, columns=2)
    return figure


def draw_traffic(theme: Theme, up: np.ndarray, down: np.ndarray, transported: np.ndarray) -> Figure:
    """Bytes per round, each (R,): what the federation would send (bars, up on down) and what the ranks really sent (line)."""
    figure, axes = canvas.start_figure(3.3)
    unit, factor = choose_byte_unit(max((up + down).max(initial=0), transported.max(initial=0)))
    rounds, gap = np.arange(len(up)) + 1, 0.2 if len(up) <= 60 else 0.0
    axes.bar(rounds, down / factor, 1 - gap, color=theme.series[5], label="simulated, down to clients")
    axes.bar(rounds, up / factor, 1 - gap, bottom=down / factor, color=theme.series[0], label="simulated, up to server")
    axes.plot(rounds, transported / factor, color=theme.series[1], linewidth=1.8, marker="o" if len(up) <= 25 else None, markersize=4,
              label="transported between ranks")
    canvas.label_rounds(axes, len(up), f"bytes per round ({unit})")
    canvas.add_legend(figure, axes, columns=2)
    return figure


def draw_seconds(theme: Theme, by_rank: Mapping[str, np.ndarray]) -> Figure:
    """Stacked bars of {phase: seconds (ranks,)}; waiting, called "idle", is hatched."""
    ranks = max((len(values) for values in by_rank.values()), default=0)
    figure, axes = canvas.start_figure(1.7 + canvas.choose_height(ranks, 0.32))
    start, colours = np.zeros(ranks), iter(theme.series * 2)
    for phase, values in by_rank.items():
        style: dict[str, Any] = {"color": theme.grid, "hatch": "////"} if phase == "idle" else {"color": next(colours)}
        axes.barh(np.arange(ranks), values, 0.72 if ranks <= LABELS_UP_TO else 1.0, left=start, label=phase, edgecolor=theme.surface,
                  linewidth=1.0 if ranks <= LABELS_UP_TO else 0.0, **style)
        start = start + values
    canvas.label_clients(axes, [f"rank {rank}" for rank in range(ranks)])
    axes.set_xlabel("time over all rounds (s)")
    axes.grid(axis="x")
    canvas.add_legend(figure, axes, columns=4)
    return figure


def draw_partition(theme: Theme, counts: np.ndarray, labels: Sequence[str]) -> Figure:
    """Training samples (K, C): bubbles whose area is the count, with the number where there is room; a heat map when there are very many."""
    clients, classes = counts.shape
    figure, axes = canvas.start_figure(1.3 + canvas.choose_height(clients, 0.27))
    canvas.label_cells(axes, labels, classes)
    if counts.size > BUBBLES_UP_TO:
        image = axes.imshow(np.where(counts > 0, counts, np.nan), cmap=canvas.make_ramp(theme), aspect="auto", interpolation="nearest", vmin=0)
        bar = figure.colorbar(image, ax=axes, location="right", fraction=0.045, pad=0.02, label="training samples")
        bar.outline.set_visible(False)
        return figure
    axes.grid(True)
    rows, columns = np.nonzero(counts)
    width, height = (canvas.WIDTH - 1.6) * 72 / max(1, classes), figure.get_figheight() * 72 * 0.78 / max(1, clients)
    largest = (0.94 * min(width * 1.3, height * 1.3, 40)) ** 2                                         # points squared, of the largest count
    axes.scatter(columns, rows, s=counts[rows, columns] / counts.max(initial=1) * largest, color=theme.series[0], alpha=0.38, linewidth=0)
    for client, class_ in zip(rows, columns, strict=True) if classes <= NUMBERS_UP_TO[0] and clients <= NUMBERS_UP_TO[1] else ():
        axes.text(float(class_), float(client), f"{counts[client, class_]}", ha="center", va="center", fontsize=8)
    if clients <= LABELS_UP_TO:
        totals = axes.secondary_yaxis("right")
        totals.set_yticks(range(clients), [f"{total}" for total in counts.sum(1)])
        totals.set_ylabel("samples of the client")
        totals.tick_params(length=0)
        totals.spines["right"].set_visible(False)
    return figure
