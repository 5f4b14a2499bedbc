"""tables: runs and their means over seeds as text for the terminal, markdown, LaTeX and CSV."""
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from hpcfl.report import measures
from hpcfl.report.measures import MEASURES, Found
from hpcfl.report.summary import WAYS
from hpcfl.wording import align_rows, byte_text, mean_sd_text, printable_text

NOTHING = "-"                                                      # as all terminals and LaTeX have it
Runs = Mapping[str, Sequence[Found]]                               # label -> summaries of runs that differ only in seed
Column = Callable[[str, Any], str]


def average_seeds(label: str, runs: Sequence[Found]) -> dict[str, Any]:
    """Runs that differ only in seed as one: {mean, sd} over seeds of each accuracy's mean, in percent, of bytes per client and of seconds.

    sd is that of a sample; None of a single run.
    """
    found = [run["accuracy"] for run in runs]
    accuracy = {key: _mean_sd([(measure.select(each) or {}).get("mean") for each in found]) for key, measure in MEASURES.items()}
    ways = {f"over_architectures_{way}": _mean_sd([(each["over_architectures"] or {}).get(way) for each in found]) for way in WAYS}
    return {"label": label, "algorithm": runs[0]["algorithm"], "seeds": [run["seed"] for run in runs], "rounds": runs[0]["rounds"],
            "refine": found[0]["refine"], "report": found[0]["report"]["measure"], "accuracy": {**accuracy, **ways},
            **{f"{way}_bytes_per_client": _mean_sd([run["bytes"][f"{way}_bytes"] / max(1, run["clients"]) for run in runs])
               for way in ("simulated_up", "simulated_down")}, "wall_s": _mean_sd([run["wall_s"] for run in runs])}


def to_text(runs: Runs) -> str:
    """A line per run, a second table of means over seeds where there are any, what the columns are of, and what to know of the runs."""
    rows = [(label, run) for label, group in runs.items() for run in group]
    repeated = [average_seeds(label, group) for label, group in runs.items() if len(group) > 1]
    parts = [_align(RUN_COLUMNS, rows)]
    if repeated:
        parts.append("mean ± sample standard deviation over seeds\n" + _align(SEED_COLUMNS, [(each["label"], each) for each in repeated]))
    notes = [f"{label}, seed {run['seed']}: {note}" for label, run in rows for note in (*run["warnings"], *_status_note(run))]
    return "\n\n".join([*parts, "\n".join(_legend([run for _, run in rows]))]
                        + (["\n".join(f"note: {printable_text(note)}" for note in notes)] if notes else []))


def to_markdown(runs: Runs) -> str:
    """A table of GitHub's markdown, a row for each label."""
    head, *body = _rows(SEED_COLUMNS, [(label, average_seeds(label, group)) for label, group in runs.items()])
    rule = ["---" if name in WORDS else "---:" for name in head]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *body))


def to_latex(runs: Runs) -> str:
    """A tabular with the rules of booktabs, a row for each label."""
    head, *body = _rows(SEED_COLUMNS, [(label, average_seeds(label, group)) for label, group in runs.items()])
    lines = [" & ".join(map(_escape, row)) + r" \\" for row in (head, *body)]
    return "\n".join([rf"\begin{{tabular}}{{{''.join('l' if name in WORDS else 'r' for name in head)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
                      r"\bottomrule", r"\end{tabular}"])


def to_csv(runs: Runs) -> str:
    """Numbers without rounding, a row for each label, units in the headings; empty where there is nothing."""
    found = [average_seeds(label, group) for label, group in runs.items()]
    rows = [{"run": each["label"], "algorithm": each["algorithm"], "seeds": " ".join(map(str, each["seeds"])), "rounds": each["rounds"],
             "after": measures.after_text(each["refine"]), "report": each["report"],
             **{f"{key}_percent_{part}": value[part] for key, value in each["accuracy"].items() for part in ("mean", "sd")},
             **{f"{key}_{part}": each[key][part] for key in ("simulated_up_bytes_per_client", "simulated_down_bytes_per_client", "wall_s")
                for part in ("mean", "sd")}} for each in found]
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


FORMATS: dict[str, Callable[[Runs], str]] = {"text": to_text, "markdown": to_markdown, "latex": to_latex, "csv": to_csv}


def progress_text(run: Found) -> str:
    """Finished rounds, of those that are planned where some are to come."""
    return f"{run['rounds']}/{run['planned_rounds']}" if (run["planned_rounds"] or 0) > run["rounds"] else str(run["rounds"])


def _mean_sd(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {"mean": float(np.mean(known)) if known else None, "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None}


def _accuracy_cell(key: str, _: str, run: Found) -> str:
    over = MEASURES[key].select(run["accuracy"])
    if not over or over["mean"] is None:
        return NOTHING
    alone = len(over.get("per_model", over.get("per_client", ()))) == 1
    return f"{over['mean']:.1f}" if alone else f"{over['mean']:.1f} ({over['min']:.1f} to {over['max']:.1f})"


def _per_client(way: str, _: str, run: Found) -> str:
    return byte_text(run["bytes"][f"simulated_{way}_bytes"] / max(1, run["clients"]))


def _with_after(accuracies: Mapping[str, Column], after: Column) -> dict[str, Column]:
    """The columns of accuracies, with what clients did last beside the one that it belongs to."""
    clients = MEASURES["generalization"].heading
    return {name: column for heading, each in accuracies.items()
            for name, column in ((heading, each), *(((measures.AFTER, after),) if heading == clients else ()))}


RUN_COLUMNS: dict[str, Column] = {
    "run": lambda label, _: printable_text(label),
    "status": lambda _, run: printable_text(run["status"].partition(":")[0]),
    "seed": lambda _, run: str(run["seed"]),
    "rounds": lambda _, run: progress_text(run),
    **_with_after({measure.heading: partial(_accuracy_cell, key) for key, measure in MEASURES.items()},
                  lambda _, run: measures.after_text(run["accuracy"]["refine"])),
    "up/client": partial(_per_client, "up"),
    "down/client": partial(_per_client, "down"),
    "seconds": lambda _, run: f"{run['wall_s']:.1f}"}
SEED_COLUMNS: dict[str, Column] = {
    "run": lambda label, _: printable_text(label),
    "seeds": lambda _, found: ", ".join(map(str, found["seeds"])),
    "rounds": lambda _, found: str(found["rounds"]),
    **_with_after({measure.heading: partial(lambda key, _, found: mean_sd_text(**found["accuracy"][key], nothing=NOTHING), key)
                   for key, measure in MEASURES.items()},
                  lambda _, found: measures.after_text(found["refine"])),
    "up/client": lambda _, found: byte_text(found["simulated_up_bytes_per_client"]["mean"]),
    "down/client": lambda _, found: byte_text(found["simulated_down_bytes_per_client"]["mean"]),
    "seconds": lambda _, found: mean_sd_text(**found["wall_s"], nothing=NOTHING)}
WORDS = ("run", "status", "seeds", measures.AFTER)                 # columns that start on the left


def _rows(columns: Mapping[str, Column], rows: Sequence[tuple[str, Any]]) -> list[list[str]]:
    """Headings and cells; a column in which nothing was measured is left out."""
    cells = {name: [column(*row) for row in rows] for name, column in columns.items()}
    kept = {name: column for name, column in cells.items() if any(cell != NOTHING for cell in column)}
    return [[*kept], *map(list, zip(*kept.values(), strict=True))]


def _align(columns: Mapping[str, Column], rows: Sequence[tuple[str, Any]]) -> str:
    return align_rows(_rows(columns, rows), words=2, also=WORDS)


def list_legend(runs: Sequence[Found]) -> list[tuple[str, str]]:
    """What each column of accuracies that any run has is of."""
    found = []
    for key, measure in MEASURES.items():
        if any((measure.select(run["accuracy"]) or {}).get("mean") is not None for run in runs):
            found += [(measure.heading, measure.sentence)] + ([(measures.AFTER, measures.AFTER_SENTENCE)] if key == "generalization" else [])
    return found


def _legend(runs: Sequence[Found]) -> list[str]:
    lines = list_legend(runs)
    wide = max((len(name) for name, _ in lines), default=0)
    return ["accuracies in percent, at the last evaluation:", *(f"  {name:<{wide}}  {sentence}" for name, sentence in lines), *list_results(runs)]


def list_results(runs: Sequence[Found]) -> list[str]:
    """Which accuracy is the result of which methods, and why."""
    methods: dict[tuple[str, str], dict[str, None]] = {}
    for run in runs:
        told = run["accuracy"]["report"]
        if told["mean"] is not None:
            methods.setdefault((MEASURES[told["measure"]].heading, told["why"]), {})[run["algorithm"]] = None
    return [f"to report of {', '.join(names)}: {heading} ({why})" for (heading, why), names in methods.items()]


def _status_note(run: Found) -> list[str]:
    """What a status says beyond its first word, of runs that may not be what they seem."""
    word, _, why = run["status"].partition(": ")
    return [f"{word}: {why}"] if word in ("died", "running?") else []


def _escape(cell: str) -> str:
    """A cell in LaTeX."""
    special = {each: f"\\{each}" for each in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(special.get(each, each) for each in cell)
