"""pictures: which figures a run has, each with its caption, the sentence for who cannot see it, and the arrays to draw."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from hpcfl.report import canvas, figures, mosaics
from hpcfl.report.measures import after_all_text, after_text
from hpcfl.report.recording import BEFORE, Recording, average
from hpcfl.wording import byte_text, count_text, duration_text, number_text, percent_text

CLASSES_PICTURED = 20                                              # rows of the grid of synthetic images
IMAGES_PICTURED = 4                                                # of a class and client
CLIENTS_PICTURED = 3
DILATION = "aggregate_dilation_accuracy"                           # measured at the server for each client
NOT_TRAINING = (DILATION, "flops", "refine_flops")                 # metrics of clients that are no curves of their training
PHASES = ("train", "refine", "aggregate", "spread", "combine", "publish", "evaluate", "checkpoint")    # stacked in this order, waiting last


@dataclass(frozen=True)
class Picture:
    """A figure of the page: file name without ending, caption, alternative text, and the drawing."""

    name: str
    title: str
    alt: str
    draw: canvas.Drawing


def picture_run(recording: Recording, prefix: str = "") -> list[Picture]:
    """The pictures of one run, those left out that it has no data for; file names start with `prefix`."""
    found = (make(recording) for make in (_accuracy, _before_after, _recall, _losses, _server, _negatives, _traffic, _seconds, _partition, _samples))
    return [replace(picture, name=prefix + picture.name) for picture in found if picture is not None]


def compare_runs(groups: Mapping[str, Sequence[Recording]]) -> list[Picture]:
    """The pictures that lay runs over each other: {label: runs that differ only in seed}; of the federation's models, where any run has one, and clients'."""
    pictures = []
    for measure, models in (("global", "the federation's own models"), ("generalization", "clients' models")):
        curves = {label: [_curve(recording, measure) for recording in group] for label, group in groups.items()}
        curves = {label: runs for label, runs in curves.items() if all(len(at) for at, _, _ in runs)}
        if not curves and measure == "global":
            continue
        ends = "; ".join(f"{label} {percent_text(np.mean([percent[-1] for _, _, percent in runs]))}" for label, runs in curves.items())
        alt = f"Mean accuracy of {models}, all runs, over {{}}. " + (f"At the end: {ends}." if ends else "Nothing was evaluated yet.")
        over_rounds = {label: [(rounds, percent) for rounds, _, percent in runs] for label, runs in curves.items()}
        over_bytes = {label: [(sent, percent) for _, sent, percent in runs] for label, runs in curves.items()}
        kind, told = ("global", "the federation's own models") if measure == "global" else ("clients", "mean of the clients' models at the end of a round")
        pictures += [Picture(f"{kind}-rounds", f"Accuracy per round: {told}", alt.format("rounds"),
                             partial(figures.draw_overlay, groups=over_rounds, against="round")),
                 Picture(f"{kind}-bytes", f"Accuracy for the bytes spent: {told}", alt.format("the simulated bytes sent so far"),
                         partial(figures.draw_overlay, groups=over_bytes, against="bytes"))]
    return pictures


def _curve(recording: Recording, measure: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounds, bytes so far and mean accuracy in percent at the evaluations that have it."""
    end = recording.stage("end")
    percent = recording.means(measure, end)
    end, percent = end[np.isfinite(percent)], percent[np.isfinite(percent)]
    at = recording.arrays["evaluation/at"][end] if len(end) else end
    sent = np.cumsum(recording.per_round("simulated_up") + recording.per_round("simulated_down"))
    return at + 1, sent[at], percent


def _accuracy(recording: Recording) -> Picture | None:
    end = recording.stage("end")
    shown = [("clients, end of the round", 0, end, recording.accuracy("generalization", end))]
    earlier = recording.stage("before_refine")
    words = [recording.refines(evaluation) for evaluation in earlier]
    for word in dict.fromkeys(words):
        found = earlier[[each == word for each in words]]
        shown.append((f"clients, before {after_text(word)}", 1, found, recording.accuracy("generalization", found)))
    shown += [("own images, end of the round", 2, end, recording.accuracy("personal", end)),
              ("global model", 3, end, recording.means("global", end)[:, None])]
    lines = {name: (colour, recording.arrays["evaluation/at"][found] + 1, values) for name, colour, found, values in shown if np.isfinite(values).any()}
    if shown[0][0] not in lines:
        return None
    last, mean = shown[0][3][-1], average(shown[0][3], 1)
    phases = recording.arrays["rounds/phase"]
    starts = [(row, str(phases[row])) for row in range(recording.rounds) if row == 0 or phases[row] != phases[row - 1]]
    alt = f"Accuracy of {count_text(recording.clients, 'client')} over {count_text(recording.rounds, 'round')}: mean {percent_text(mean[0])} at the " \
          f"first evaluation and {percent_text(mean[-1])} at the last, clients then between {percent_text(np.nanmin(last))} and " \
          f"{percent_text(np.nanmax(last))}." if np.isfinite(mean[-1]) else "Accuracy per round."
    if "global model" in lines:
        alt += f" The federation's own models end at {percent_text(lines['global model'][2][-1, 0])}."
    return Picture("accuracy", "Accuracy per round", alt,
                   partial(figures.draw_accuracy, lines=lines, chance=100 / recording.classes, phases=starts))


def _before_after(recording: Recording) -> Picture | None:
    end, before = recording.last("end"), recording.last("before_refine")
    if end is None:
        return None
    now, refine = recording.accuracy("generalization", [end])[0], recording.refines(end)
    if refine is not None and before is not None:
        title = f"Clients before and after {after_all_text(refine)}"
        points = {f"before {after_text(refine)}": (1, recording.accuracy("generalization", [before])[0]), f"after {after_text(refine)}": (0, now)}
    else:
        title, personal = "Clients after the last evaluated round", recording.accuracy("personal", [end])[0]
        points = {"whole test set": (0, now)} | ({"own images": (2, personal)} if np.isfinite(personal).any() else {})
    told = "; ".join(f"{name}: mean {percent_text(average(values, 0))}" for name, (_, values) in points.items())
    return Picture("clients", title, f"{title}, last evaluation. {told}.", partial(figures.draw_before_after, labels=_labels(recording), points=points))


def _recall(recording: Recording) -> Picture | None:
    values = recording.recall(recording.last("end"))
    if not np.isfinite(values).any():
        return None
    by_class = average(values, 0)
    alt = f"Heat map of recall, clients by classes. On average the best class is {np.nanargmax(by_class)} with " \
          f"{percent_text(np.nanmax(by_class))}, the worst {np.nanargmin(by_class)} with {percent_text(np.nanmin(by_class))}."
    return Picture("recall", "Recall by client and class", alt,
                   partial(figures.draw_recall, values=values, absent=recording.absent(), labels=_labels(recording)))


def _losses(recording: Recording) -> Picture | None:
    series = {name: values for name, values in recording.datasets("train").items() if name not in NOT_TRAINING and np.isfinite(values).any()}
    ordered = {name: series[name] for name in sorted(series, key=lambda name: (name != "loss", name))}
    ends = [(name, average(values[np.isfinite(values).any(1)], 1)) for name, values in ordered.items()]
    told = "; ".join(f"{name} from {number_text(mean[0], 3)} to {number_text(mean[-1], 3)}" for name, mean in ends)
    alt = f"Training per round, mean over clients: {told}."
    return Picture("training", "Training", alt, partial(figures.draw_losses, series=ordered)) if ordered else None


def _server(recording: Recording) -> Picture | None:
    known = recording.notes()
    compression = sorted((name for name in known if name.startswith("compression_accuracy ")), reverse=True)         # from wide to narrow
    lines = {name.replace("_accuracy", ""): known[name] for name in ("aggregation_accuracy", *compression) if name in known}
    dilated = recording.datasets("train").get(DILATION, np.full((recording.rounds, recording.clients), np.nan))
    clients = average(dilated, 1)
    told = {**lines, **({"dilation, mean of clients": clients} if np.isfinite(clients).any() else {})}
    ends = "; ".join(f"{name} {percent_text(values[np.isfinite(values)][-1])}" for name, values in told.items())
    alt = f"Accuracy of the server's models on its public validation part over {count_text(recording.rounds, 'round')}. At the end: {ends}."
    return Picture("server", "The server's models on its public validation part", alt,
                   partial(figures.draw_server, notes=lines, dilated=dilated)) if told else None


def _negatives(recording: Recording) -> Picture | None:
    paths, sizes, values = recording.negatives()
    measured = np.flatnonzero(np.isfinite(values).any((1, 2)))
    if not len(measured):
        return None
    names = ["before compression" if size == BEFORE else size for size in sizes]
    means = (f"{name} {percent_text(mean)}" for name, mean in zip(names, average(values[measured[-1]], 0), strict=True))
    title = "Share of negative weights" + ("" if len(paths) <= figures.PANELS_UP_TO else f", round {measured[-1] + 1}")
    alt = f"Share of negative weights of {count_text(len(paths), 'parameter')} before and after compression. Mean over parameters in round " \
          f"{measured[-1] + 1}: {'; '.join(means)}."
    short = [path.removesuffix(".weight") for path in paths]
    return Picture("negatives", title, alt, partial(figures.draw_negatives, paths=short, sizes=names, values=values))


def _traffic(recording: Recording) -> Picture | None:
    sent = {name: recording.per_round(path) for name, path in (("up", "simulated_up"), ("down", "simulated_down"), ("transported", "transported"))}
    up, down, transported = (byte_text(values.sum()) for values in sent.values())
    alt = f"Bytes per round. Totals: simulated up {up}, simulated down {down}, transported between ranks {transported}."
    draw = partial(figures.draw_traffic, up=sent["up"], down=sent["down"], transported=sent["transported"])
    return Picture("bytes", "Bytes per round", alt, draw) if any(values.any() for values in sent.values()) else None


def _seconds(recording: Recording) -> Picture | None:
    by_rank = {name: np.nan_to_num(values.astype(float)).sum(0) for name, values in recording.datasets("seconds").items()}
    order = (*PHASES, *sorted(by_rank.keys() - {*PHASES, "idle"}), "idle")
    shown = {name: by_rank[name] for name in order if name in by_rank and by_rank[name].any()}
    totals = "; ".join(f"{name} {duration_text(values.sum())}" for name, values in shown.items())
    alt = f"Time of each rank by phase, all rounds. Over all ranks: {totals}."
    return Picture("seconds", "Seconds by phase and rank", alt, partial(figures.draw_seconds, by_rank=shown)) if shown else None


def _partition(recording: Recording) -> Picture | None:
    counts = recording.arrays.get("partition/train")
    if counts is None or not counts.size:
        return None
    alt = f"Training samples of {count_text(recording.clients, 'client')} by class: {counts.sum()} in all, clients hold {counts.sum(1).min()} to " \
          f"{counts.sum(1).max()}, and {number_text((counts > 0).sum(1).mean())} of {recording.classes} classes on average."
    return Picture("partition", "Training samples by client and class", alt, partial(figures.draw_partition, counts=counts, labels=_labels(recording)))


def _samples(recording: Recording) -> Picture | None:
    held = recording.datasets("samples")
    if not {"synthetic", "real", "has"} <= held.keys() or not held["has"].size:
        return None
    real, synthetic = held["real"][:CLASSES_PICTURED, :IMAGES_PICTURED], held["synthetic"][:CLIENTS_PICTURED, :CLASSES_PICTURED, :IMAGES_PICTURED]
    owners = held.get("client", np.full(len(held["has"]), -1))[:CLIENTS_PICTURED]
    names = [f"synthetic, client {owner}" if owner >= 0 else "synthetic" for owner in owners]
    has = held["has"][:CLIENTS_PICTURED, :CLASSES_PICTURED].astype(bool)
    alt = f"Rows of images by class, real ones on the left, beside them {', '.join(names)}; {has.any(0).sum()} of {len(real)} classes have " \
          "synthetic images."
    return Picture("samples", "Real and synthetic images", alt, partial(mosaics.draw_samples, real=real, synthetic=synthetic, has=has, owners=names))


def _labels(recording: Recording) -> list[str]:
    architectures = recording.arrays.get("clients/architecture", [""] * recording.clients)
    mixed = len(set(architectures)) > 1
    return [f"{client} {architectures[client]}" if mixed else f"client {client}" for client in range(recording.clients)]
