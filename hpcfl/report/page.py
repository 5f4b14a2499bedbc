"""page: the report of one or several runs as one HTML file without scripts or outside resources, and its figures as PNG files."""
import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter

from hpcfl.errors import JobError
from hpcfl.files.atomic import replacing
from hpcfl.report import figures, pictures
from hpcfl.report.hdf5_view import byte_text
from hpcfl.report.labels import label_groups
from hpcfl.report.measures import AFTER, MEASURES, Found, after_text
from hpcfl.report.pictures import NOTHING, Picture, count_text, number_text, seconds_text
from hpcfl.report.recording import Recording, read
from hpcfl.report.summary import WAYS, summarise
from hpcfl.report.tables import average_seeds, list_legend, list_results, mean_sd_text, progress_text

SELECTION = ("Of the accuracies over architectures the one to report is the final one: the number of rounds was fixed beforehand, so that nothing selected it. "
             "Selected by validation is the evaluation at which the validation parts of an architecture's clients were best: those have the clients' own "
             "classes, so that with skewed shares they say little of the whole test set and may choose an early round. Best on test is selected by test data; "
             "it is here to compare with papers that publish it.")
STYLE = """
:root { color-scheme: light dark; --surface: #fff; --page: #f4f6f8; --ink: #1c2430; --muted: #5b6675; --line: #dfe4ea; }
@media (prefers-color-scheme: dark) {
  :root { --surface: #161b22; --page: #0d1117; --ink: #e6eaf0; --muted: #9aa5b4; --line: #2c343f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 82rem; margin: 0 auto; padding: 1.5rem clamp(0.75rem, 3vw, 2rem) 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 0.25rem; } h2 { font-size: 1.3rem; margin: 2.75rem 0 0.25rem; overflow-wrap: anywhere; }
p { margin: 0.25rem 0 0.75rem; max-width: 75ch; } .note { color: var(--muted); font-size: 0.9rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; background: var(--surface); border: 1px solid var(--line); border-radius: 10px; margin: 0.75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.7rem 0.9rem 0.3rem; color: var(--muted); }
th, td { padding: 0.4rem 0.65rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4.5rem; }
th:first-child { padding-left: 0.9rem; } th:first-child, td.word, thead th.word { text-align: left; }
tbody th { font-weight: 600; white-space: normal; min-width: 9rem; } td small, th small { display: block; color: var(--muted); font-weight: 400; }
dl.words { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; color: var(--muted); font-size: 0.9rem; margin: 0.5rem 0 1rem; }
dl.words dt { font-weight: 600; } dl.words dd { margin: 0; } nav { margin: 0.75rem 0; }
nav ul { margin: 0.25rem 0; padding: 0; list-style: none; columns: 22rem; column-gap: 2rem; font-size: 0.92rem; }
a { color: inherit; text-underline-offset: 0.15em; } .warning { border-left: 4px solid #d55e00; padding: 0.1rem 0.75rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.75rem; margin: 1rem 0; padding: 0; }
.tiles div { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 0.6rem 0.9rem; }
.tiles dt { color: var(--muted); font-size: 0.85rem; } .tiles dd { margin: 0; font-size: 1.35rem; font-weight: 650; }
.tiles small { display: block; color: var(--muted); font-size: 0.8rem; font-weight: 400; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; margin: 1rem 0; align-items: start; }
figure { margin: 0; background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 0.75rem; }
figcaption { font-weight: 600; margin: 0 0.25rem 0.4rem; } img { display: block; width: 100%; height: auto; max-width: 46rem; margin: 0 auto; }
details { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; margin: 0.75rem 0; padding: 0.55rem 0.9rem; }
summary { cursor: pointer; font-weight: 600; } details .scroll { border: 0; margin: 0.5rem -0.9rem 0; border-radius: 0; }
pre { overflow-x: auto; font: 0.85rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { body { background: none; } figure, .scroll { break-inside: avoid; } }
"""
FRAME = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head><body><main>
{body}
</main></body></html>
"""


@dataclass(frozen=True)
class Run:
    """One run of the page: its number from 1, the label of its group, what was recorded and what `summary` makes of that."""

    number: int
    label: str
    recording: Recording
    found: Found

    @property
    def title(self) -> str:
        """The label, with the seed."""
        return f"{self.label}, seed {self.recording.seed}"


def write(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write `out`/report.html, one page that needs no other file, and its figures as PNG and SVG under `out`/figures; returns the page's path.

    Raises: as `read`, before anything is written; JobError without runs or where `out` cannot be written.
    """
    recordings = [read(run) for run in dict.fromkeys(Path(run) for run in runs)]
    if not recordings:
        raise JobError("report: no run was named; wanted at least one run folder")
    try:
        return _write(recordings, Path(out))
    except OSError as error:
        raise JobError(f"{out}: cannot write the report: {error.strerror or error}; name another folder with --out") from None


def _write(recordings: Sequence[Recording], out: Path) -> Path:
    """The same of what was read, the runs grouped by label. Raises: OSError."""
    groups = label_groups(recordings)
    found = {label: [summarise(recording) for recording in group] for label, group in groups.items()}
    runs = [Run(number, label, recording, facts) for number, (label, recording, facts) in enumerate(
        ((label, *pair) for label, group in groups.items() for pair in zip(group, found[label], strict=True)), start=1)]
    several = len(runs) > 1
    body = [f"<h1>{f'hpcfl report: {len(runs)} runs' if several else 'hpcfl report'}</h1>", _contents(runs) if several else "", *_first_tables(runs, found)]
    if several:
        body += ['<h2 id="comparison">Comparison</h2>', _gallery(pictures.compare_runs(groups), out / "figures")]
    for run in runs:
        prefix = f"{run.number:02d}-{_slug(run.recording.algorithm)}-" if several else ""
        body += [_headline(run, several), *_architectures(run.found), _gallery(pictures.picture_run(run.recording, prefix), out / "figures"),
                 *_fold_details(run.recording, run.found)]
    page = FRAME.format(title=escape("hpcfl report: " + ", ".join(groups)), style=STYLE, body="\n".join(body))
    return replace_file(out / "report.html", page.encode())


def replace_file(path: Path, content: bytes) -> Path:
    """Replace a file whole; returns its path. Raises: OSError."""
    with replacing(path, lambda error: OSError(error.errno, error.strerror)) as draft:
        draft.write(content)
    return path


def _contents(runs: Sequence[Run]) -> str:
    entries = [("results", "Results"), ("comparison", "Comparison"), *((f"run-{run.number}", f"{run.number}. {run.title}") for run in runs)]
    return f'<nav aria-label=Contents><ul>{"".join(f"<li><a href=#{anchor}>{escape(text)}</a></li>" for anchor, text in entries)}</ul></nav>'


def _first_tables(runs: Sequence[Run], found: Mapping[str, Sequence[Found]]) -> list[str]:
    """Means over seeds, where there are several, then each run, and what the numbers are."""
    repeated = [(average_seeds(label, group),) for label, group in found.items() if len(group) > 1]
    tables = [_table("Mean ± sample standard deviation over seeds", SEED_COLUMNS, repeated)] if repeated else []
    tables.append(_table("Each run at its last evaluation", RUN_COLUMNS, [(run,) for run in runs]))
    if any(each["accuracy"]["over_architectures_selected"]["mean"] is not None for each, in repeated):
        tables.append(_table("Over architectures: mean ± sample standard deviation over seeds", WAY_COLUMNS, repeated))
    if any(run.found["accuracy"]["over_architectures"] for run in runs):
        tables.append(f"<p class=note>{SELECTION}</p>")
    legend = "".join(f"<dt>{escape(name)}</dt><dd>{escape(sentence)}</dd>" for name, sentence in list_legend([run.found for run in runs]))
    told = "".join(f"<p class=note>{escape(text[0].upper() + text[1:])}.</p>" for text in list_results([run.found for run in runs]))
    return ['<h2 id="results">Results</h2>', *tables, f"<p class=note>Accuracies in percent, the one to report in bold.</p><dl class=words>{legend}</dl>{told}"]


def _architectures(found: Found) -> list[str]:
    over = found["accuracy"]["over_architectures"] or {"per_architecture": {}}
    accuracies = [*over["per_architecture"].items(), ("mean", over)] if over["per_architecture"] else []
    flops = [(phase, name, counted) for phase, entries in found["flops"].items() for name, counted in entries.items()]
    tables: tuple[tuple[str, Mapping[str, Callable[..., str]], Sequence[tuple[Any, ...]]], ...] = (
        ("Architectures: size, time and bytes per client and round", ARCHITECTURE_COLUMNS, [(entry,) for entry in found["by_architecture"]]),
        ("Architectures: mean accuracy of their clients, three ways", ACCURACY_COLUMNS, accuracies),
        ("Architectures: floating-point operations per client and round, two for each multiply-add", FLOPS_COLUMNS, flops))
    return [_table(caption, columns, rows) for caption, columns, rows in tables if rows]


def _flops_text(count: float | None) -> str:
    return NOTHING if count is None else EngFormatter("FLOP", 2)(count)


def _duration_text(seconds: float | None) -> str:
    return NOTHING if seconds is None else seconds_text(seconds)


def _accuracy_cell(key: str, run: Run) -> str:
    """Mean of an accuracy, below it the lowest and highest, bold where it is the run's result."""
    accuracy = run.found["accuracy"]
    over = MEASURES[key].select(accuracy)
    if not over or over["mean"] is None:
        return NOTHING
    mean = number_text(over["mean"])
    range_ = "" if len(over.get("per_model", (0, 0))) == 1 else f"<small>{number_text(over['min'])} – {number_text(over['max'])}</small>"
    return (f"<b>{mean}</b>" if accuracy["report"]["measure"] == key else mean) + range_


def _mean_sd(key: str, each: Found) -> str:
    text = escape(mean_sd_text(each["accuracy"][key], NOTHING))
    return f"<b>{text}</b>" if each["report"] == key else text


def _with_after(column: Callable[[str], Callable[[Any], str]], after: Callable[[Any], str]) -> dict[str, Callable[[Any], str]]:
    """A column for each accuracy, with what clients did last behind theirs."""
    found: dict[str, Callable[[Any], str]] = {}
    for key, measure in MEASURES.items():
        found[measure.heading.capitalize()] = column(key)
        if key == "generalization":
            found[AFTER.capitalize()] = after
    return found


def _run_heading(run: Run) -> str:
    facts = [f"seed {run.recording.seed}", f"rounds {progress_text(run.found)}", run.recording.status.split(":")[0]]
    return f"<a href=#run-{run.number}>{escape(run.label)}</a><small>{escape(', '.join(facts))}</small>"


def _percent_text(value: float | None) -> str:
    return NOTHING if value is None else f"{number_text(value)} %"


def _per_client(found: Found, direction: str) -> str:
    sent = found["bytes"]["per_client"][f"simulated_{direction}_bytes"]
    return byte_text(sum(sent) / max(1, len(sent)))


RUN_COLUMNS: dict[str, Callable[[Run], str]] = {
    "Run": _run_heading,
    **_with_after(lambda key: partial(_accuracy_cell, key), lambda run: escape(after_text(run.found["accuracy"]["refine"]))),
    "Bytes per client": lambda run: f"{_per_client(run.found, 'up')} up<small>{_per_client(run.found, 'down')} down</small>",
    "Time": lambda run: seconds_text(run.found["wall_s"])}
SEED_COLUMNS: dict[str, Callable[[Found], str]] = {
    "Runs that differ only in seed": lambda each: f"{escape(each['label'])}<small>seeds {escape(', '.join(map(str, each['seeds'])))}</small>",
    **_with_after(lambda key: partial(_mean_sd, key), lambda each: escape(after_text(each["refine"]))),
    "Time (s)": lambda each: mean_sd_text(each["wall_s"], NOTHING)}
WAY_COLUMNS: dict[str, Callable[[Found], str]] = {
    "Runs that differ only in seed": lambda each: escape(each["label"]),
    **{f"{told} (%)": partial(lambda way, each: mean_sd_text(each["accuracy"][f"over_architectures_{way}"], NOTHING), way) for way, told in WAYS.items()}}
TARGET_COLUMNS: dict[str, Callable[[str, dict[str, int]], str]] = {
    "Mean accuracy of at least (%)": lambda target, _: target,
    "Rounds": lambda _, cost: str(cost["rounds"]),
    "Simulated bytes": lambda _, cost: byte_text(cost["simulated_bytes"]),
    "Transported bytes": lambda _, cost: byte_text(cost["transported_bytes"])}
ARCHITECTURE_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "Architecture": lambda entry: escape(entry["architecture"]),
    "Clients": lambda entry: str(entry["clients"]),
    "Parameters": lambda entry: NOTHING if entry["parameters"] is None else f"{entry['parameters']:,}",
    "Forward pass of an image": lambda entry: _flops_text(entry["forward_flops"]),
    "Memory to train": lambda entry: NOTHING if entry["memory_bytes"] is None else byte_text(entry["memory_bytes"]),
    "Training": lambda entry: _duration_text(entry["train_s"]),
    "Refining": lambda entry: _duration_text(entry["refine_s"]),
    "Simulated up": lambda entry: byte_text(entry["simulated_up_bytes"]),
    "Simulated down": lambda entry: byte_text(entry["simulated_down_bytes"]),
    "Clients (%)": lambda entry: number_text(entry["generalization"]),
    "Own images (%)": lambda entry: number_text(entry["personal"])}
ACCURACY_COLUMNS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "Architecture": lambda name, _: escape(name),
    **{f"{told} (%)": partial(lambda way, _, entry: number_text(entry[way]), way) for way, told in WAYS.items()},
    "Rounds until the selected": lambda _, entry: str(entry.get("selected_rounds") or NOTHING)}
FLOPS_COLUMNS: dict[str, Callable[[str, str, dict[str, float | None]], str]] = {
    "Phase": lambda phase, *_: escape(phase),
    "Architecture": lambda _, name, __: escape(name),
    "Training": lambda _, __, counted: _flops_text(counted["training_flops_per_round"]),
    "Refining": lambda _, __, counted: _flops_text(counted["refining_flops_per_round"])}
WORDS = ("After", "Phase", "Architecture")


def _headline(run: Run, several: bool) -> str:
    recording, found, accuracy, sent = run.recording, run.found, run.found["accuracy"], run.found["bytes"]
    known = {key: values for key, measure in MEASURES.items() if (values := measure.select(accuracy)) and values["mean"] is not None}
    tiles = {name: (_percent_text(known[key]["mean"]), note) for key, (name, note) in _names(accuracy).items() if key in known}
    idle = "wall clock" if found["idle_share"] is None else f"waiting {number_text(100 * found['idle_share'])} %"
    idle += "" if found["load_balance"] is None or recording.ranks == 1 else f", busiest rank {number_text(found['load_balance'], 2)} of the mean"
    tiles |= {"Simulated bytes": (byte_text(sent["simulated_up_bytes"] + sent["simulated_down_bytes"]),
                                  f"{byte_text(sent['simulated_up_bytes'])} up, {byte_text(sent['simulated_down_bytes'])} down"),
              "Transported bytes": (byte_text(sent["transported_bytes"]), f"between {count_text(recording.ranks, 'rank')}"),
              "Time": (seconds_text(found["wall_s"]), idle)}
    if conditions := found["conditions"]:
        share = 100 * conditions["answered"] / max(1, conditions["asked"])
        tiles["Answers"] = (_percent_text(share), f"{conditions['dropped']} dropped out, {conditions['late']} late; "
                                              f"{seconds_text(conditions['simulated_s'])} simulated")
    cells = "".join(f"<div><dt>{name}</dt><dd>{value[0]}<small>{value[1]}</small></dd></div>" for name, value in tiles.items())
    origin = f" ({found['data_source']}, SHA-256 {found['data_sha256'][:12]})" if found["data_source"] else ""
    facts = f"{recording.algorithm} on {found['data']}{origin}, {count_text(recording.clients, 'client')}, {count_text(recording.ranks, 'rank')}, " \
            f"{count_text(recording.rounds, 'round')} finished, status: {recording.status}, folder {recording.folder}"
    warnings = "".join(f"<p class=warning>{escape(text)}.</p>" for text in found["warnings"])
    heading = f"{run.number}. {run.title}" if several else run.title
    return f'<h2 id="run-{run.number}">{escape(heading)}</h2><p class=note>{escape(facts)}</p>{warnings}<dl class=tiles>{cells}</dl>'


def _names(accuracy: Found) -> dict[str, tuple[str, str]]:
    """What each accuracy of a run is, in a heading and a note."""
    done = after_text(accuracy["refine"])
    return {"global": ("Global model", "the federation's own, whole test set"),
            "generalization": (f"Clients after {done}", f"whole test set, sd over clients {number_text(accuracy['generalization']['sd'])}"),
            "before": (f"Clients before {done}", "as they had trained, whole test set"),
            "personal": ("Own images", f"clients after {done}, held-out images of their own"),
            "absent_classes": ("Absent classes", f"clients after {done}, test images of classes not in their data")}


def _fold_details(recording: Recording, found: Found) -> list[str]:
    reached = [(target, cost) for target, cost in found["bytes"]["until_accuracy"].items() if cost is not None]
    model = {"global": "of the federation's own models", "generalization": "of the clients' models"}[found["bytes"]["until_accuracy_of"]]
    parts = {"Clients": _clients(recording, found), "Ranks": _ranks(recording, found),
             "Bytes until an accuracy": _table(f"First evaluation at which the mean {model} reached it", TARGET_COLUMNS, reached) if reached else "",
             "Resolved job": f"<pre>{escape(recording.job_text)}</pre>"}
    return [f"<details><summary>{name}</summary>{inner}</details>" for name, inner in parts.items() if inner]


def _clients(recording: Recording, found: Found) -> str:
    counts, accuracy = recording.arrays.get("partition/train"), found["accuracy"]
    described = recording.datasets("clients")
    columns = {"Client": lambda client: str(client)}
    memory, forward = described.pop("memory_bytes", None), described.pop("forward_flops", None)
    columns |= {name.capitalize(): partial(lambda values, client: escape(str(values[client])), values) for name, values in sorted(described.items())}
    if memory is not None:
        columns["Memory to train"] = lambda client: byte_text(memory[client])
    if forward is not None:
        columns["Forward pass of an image"] = lambda client: _flops_text(forward[client])
    if counts is not None:
        columns["Training samples"] = lambda client: str(counts[client].sum())
        columns["Absent classes"] = lambda client: str((counts[client] == 0).sum())
    if (answered := recording.arrays.get("conditions/answered")) is not None:
        columns["Answers"] = lambda client: f"{(answered[:, client] == 1).sum()} of {(answered[:, client] >= 0).sum()}"
    headings = {"before": f"Before {after_text(accuracy['refine'])} (%)", "generalization": f"After {after_text(accuracy['refine'])} (%)",
                "personal": "Own images (%)"}
    for key, heading in headings.items():
        if (over := MEASURES[key].select(accuracy)) and over["mean"] is not None:
            columns[heading] = partial(lambda values, client: number_text(values[client]), over["per_client"])
    for direction in ("up", "down"):
        sent = found["bytes"]["per_client"][f"simulated_{direction}_bytes"]
        columns[f"Simulated {direction}"] = partial(lambda values, client: byte_text(values[client]), sent)
    return _table("Last evaluation, bytes over all rounds", columns, ((client,) for client in range(recording.clients)))


def _ranks(recording: Recording, found: Found) -> str:
    """Seconds of each rank, with what it waited of all its time; nothing for a single rank."""
    by_rank = found["seconds_by_rank"]
    if recording.ranks == 1 or not by_rank:
        return ""
    columns = {"Rank": lambda rank: str(rank)}
    columns |= {name.capitalize(): partial(lambda values, rank: seconds_text(values[rank]), values) for name, values in by_rank.items()}
    if "idle" in by_rank and found["wall_s"]:
        columns["Waiting (%)"] = lambda rank: number_text(100 * by_rank["idle"][rank] / found["wall_s"])
    return _table("Seconds of each rank, all rounds", columns, ((rank,) for rank in range(recording.ranks)))


def _table(caption: str, columns: Mapping[str, Callable[..., str]], rows: Iterable[tuple]) -> str:
    """A table of the columns in which anything is known; cells are markup."""
    rows = list(rows)
    cells = {name: [cell(*row) for row in rows] for name, cell in columns.items()}
    known = {name: column for name, column in cells.items() if any(cell != NOTHING for cell in column)}
    kind = {name: " class=word" if name in WORDS else "" for name in known}
    head = "".join(f"<th scope=col{kind[name]}>{escape(name)}</th>" for name in known)
    body = []
    for row in zip(*known.values(), strict=True):
        first, *others = (f"{kind[name]}>{cell}" for name, cell in zip(known, row, strict=True))
        body.append(f"<tr><th scope=row{first}</th>" + "".join(f"<td{other}</td>" for other in others) + "</tr>")
    return f'<div class=scroll tabindex=0 role=region aria-label="{caption}"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>' \
           f"<tbody>{''.join(body)}</tbody></table></div>"


def _gallery(pictures: Iterable[Picture], folder: Path) -> str:
    return f"<div class=figures>{''.join(_figure(picture, folder) for picture in pictures)}</div>"


def _figure(picture: Picture, folder: Path) -> str:
    light, dark = figures.to_png(picture.draw, figures.LIGHT), figures.to_png(picture.draw, figures.DARK)
    replace_file(folder / f"{picture.name}.png", light)
    replace_file(folder / f"{picture.name}.svg", figures.to_svg(picture.draw))
    width, height = (int.from_bytes(light[start:start + 4], "big") for start in (16, 20))              # of the PNG header: no jump while loading
    sources = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in (light, dark)]
    return f'<figure><figcaption>{escape(picture.title)}</figcaption><picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">' \
           f'<img src="{sources[0]}" width={width} height={height} alt="{escape(picture.alt)}"></picture></figure>'


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")[:20]
