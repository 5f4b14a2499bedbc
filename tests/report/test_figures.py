"""Figures: what is drawn is in sight, and names do not lie on each other."""
import numpy as np
import pytest

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


def test_a_small_partition_is_bubbles_with_numbers_and_a_large_one_a_heat_map():
    small = figures.draw_partition(canvas.LIGHT, np.array([[3, 0], [1, 40]]), ["client 0", "client 1"])
    assert not small.axes[0].images and sorted(text.get_text() for text in small.axes[0].texts) == ["1", "3", "40"]
    bubbles, = small.axes[0].collections
    assert len(bubbles.get_sizes()) == 3 and bubbles.get_sizes()[2] == pytest.approx(40 * bubbles.get_sizes()[1]), "the area is the count"
    large = figures.draw_partition(canvas.LIGHT, np.ones((101, 12), int), [f"client {client}" for client in range(101)])
    assert len(large.axes[0].images) == 1 and not large.axes[0].texts


def test_a_loss_that_spans_decades_is_logarithmic_and_others_begin_at_zero():
    decades, narrow, signed = np.array([[100.0, 90.0], [0.5, 0.4]]), np.array([[2.0, 1.9], [1.0, np.nan]]), np.array([[-1.0, 1.0], [0.0, 1.0]])
    figure = figures.draw_losses(canvas.LIGHT, {"far_apart": decades, "narrow": narrow, "signed": signed})
    first, second, third, spare = figure.axes
    assert (first.get_yscale(), second.get_yscale(), third.get_yscale()) == ("log", "linear", "linear") and first.get_title() == "far apart"
    assert second.get_ylim()[0] == 0 and third.get_ylim()[0] < -1 and not spare.get_visible()


def test_waiting_is_hatched_and_work_is_coloured():
    figure = figures.draw_seconds(canvas.LIGHT, {"train": np.array([1.0, 2.0]), "idle": np.array([1.0, 0.0])})
    hatches = {bar.get_label(): [patch.get_hatch() for patch in bar] for bar in figure.axes[0].containers}
    assert hatches == {"train": [None, None], "idle": ["////", "////"]}
    assert [patch.get_x() for patch in figure.axes[0].containers[1]] == [1.0, 2.0], "stacked"


def test_many_parameters_are_rows_of_a_heat_map_and_few_have_a_panel_each():
    values = np.full((3, 12, 2), 25.0)
    values[0] = np.nan
    panels = figures.draw_negatives(canvas.LIGHT, ["a", "b"], ["before compression", "cnn1@0.5"], values[:, :2])
    assert [axes.get_title() for axes in panels.axes if axes.get_visible()] == ["a", "b"] and panels.axes[0].lines[0].get_xdata().tolist() == [2, 3]
    heat = figures.draw_negatives(canvas.LIGHT, [f"layer {n}" for n in range(12)], ["before compression", "cnn1@0.5"], values)
    assert heat.axes[0].images[0].get_array().shape == (12, 2) and len(heat.axes[0].texts) == 24


def test_bytes_have_one_unit_for_what_was_simulated_and_transported():
    figure = figures.draw_traffic(canvas.LIGHT, np.array([2e6, 2e6]), np.array([1e6, 0.0]), np.array([3e6, 4e6]))
    axes, = figure.axes
    assert axes.get_ylabel() == "bytes per round (MB)" and axes.lines[0].get_ydata().tolist() == [3.0, 4.0]
    assert [[patch.get_height() for patch in bars] for bars in axes.containers] == [[1.0, 0.0], [2.0, 2.0]]


def test_means_over_clients_leave_out_who_has_no_value():
    figure = figures.draw_before_after(canvas.LIGHT, ["client 0", "client 1"], {"before": (1, np.array([10.0, np.nan])), "after": (0, np.array([20.0, 40.0]))})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before (mean 10.0 %)", "after (mean 30.0 %)"]


def test_recall_marks_absent_classes_and_numbers_stand_in_small_maps():
    figure = figures.draw_recall(canvas.DARK, np.array([[0.0, 100.0], [50.0, np.nan]]), np.array([[True, False], [False, False]]), ["client 0", "client 1"])
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["0", "100", "50"] and len(axes.collections[0].get_offsets()) == 1


def test_the_servers_accuracies_are_drawn_where_they_were_measured():
    figure = figures.draw_server(canvas.LIGHT, {"aggregation": np.array([np.nan, 60.0])}, np.array([[np.nan, np.nan], [30.0, 50.0]]))
    lines = {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in figure.axes[0].lines}
    assert lines["aggregation"] == ([2], [60.0]) and lines["dilation, mean of clients"] == ([2], [40.0])
