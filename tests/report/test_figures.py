"""Figures: what is drawn is in sight, and names do not lie on each other."""
import numpy as np

from hpcfl.report import canvas, figures


def test_names_of_phases_do_not_overlap():
    figure = figures.draw_accuracy(canvas.LIGHT, {"clients": (0, np.arange(1, 41), np.full((40, 2), 50.0))}, 10.0,
                              [(0, "statistics"), (1, "warm-up"), (2, "generator"), (3, "rounds"), (38, "finetune"), (39, "calibrate")])
    figure.canvas.draw()
    names = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [text.get_window_extent() for text in names]
    assert len(names) == 6 and not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_what_is_reached_in_one_exchange_or_for_nothing_is_in_sight_among_costly_runs():
    runs = {"costly": [(np.array([1e6, 6e7]), np.array([20.0, 60.0]))], "one exchange": [(np.array([1e5]), np.array([99.0]))],
            "local": [(np.array([0.0, 0.0]), np.array([10.0, 30.0]))]}
    figure = figures.draw_overlay(canvas.LIGHT, runs, "bytes")
    figure.canvas.draw()
    axes = figure.axes[0]
    ends = {line.get_color(): line for line in axes.lines if line.get_markersize() == 8}
    assert len(ends) == 3 and not any(line.get_clip_on() for line in ends.values())
    left = [axes.transData.transform((line.get_xdata()[0], line.get_ydata()[0]))[0] for line in ends.values()]
    assert left[0] > left[1] > left[2] and min(np.diff(sorted(left))) > 20, "no two ends lie on each other, although 600 times the bytes part them"
    assert sum(bool(text.arrow_patch) for text in axes.texts) == 3, "from each end a line leads to the right"
