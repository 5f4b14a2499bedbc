"""page_tables: the tables of the report's page as HTML; a column in which nothing is known is left out, and what came out of files is escaped."""
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from matplotlib.ticker import EngFormatter

from hpcfl.report.measures import AFTER, MEASURES, Found, after_text
from hpcfl.report.recording import Recording
from hpcfl.report.summary import WAYS
from hpcfl.report.tables import average_seeds, list_legend, list_results, progress_text
from hpcfl.wording import NOTHING, byte_text, duration_text, mean_sd_text, number_text

WAYS_EXPLAINED = (
    "<p class=note id=ways>Of the accuracies over architectures the one to report is the final one: the number of rounds was fixed beforehand, so that "
    "nothing selected it. Selected by validation is the evaluation at which the validation parts of an architecture's clients were best: those have the "
    "clients' own classes, so that with skewed shares they say little of the whole test set and may choose an early round. Best on test is selected by "
    "test data; it is here to compare with papers that publish it.</p>")
WAYS_EXPLAINED_ABOVE = "<p class=note><a href=#ways>Which of the three to report</a></p>"


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


def list_results_tables(runs: Sequence[Run], found: Mapping[str, Sequence[Found]]) -> list[str]:
    """Means over seeds, where there are several, then each run, and what the numbers are."""
    repeated = [(average_seeds(label, group),) for label, group in found.items() if len(group) > 1]
    tables = [render_table("Mean ± sample standard deviation over seeds", SEED_COLUMNS, repeated)] if repeated else []
    tables.append(render_table("Each run at its last evaluation", RUN_COLUMNS, [(run,) for run in runs]))
    if any(each["accuracy"]["over_architectures_selected"]["mean"] is not None for each, in repeated):
        tables += [render_table("Over architectures: mean ± sample standard deviation over seeds", WAY_COLUMNS, repeated), WAYS_EXPLAINED]
    legend = "".join(f"<dt>{escape(name)}</dt><dd>{escape(sentence)}</dd>" for name, sentence in list_legend([run.found for run in runs]))
    told = "".join(f"<p class=note>{escape(text[0].upper() + text[1:])}.</p>" for text in list_results([run.found for run in runs]))
    return ['<h2 id="results">Results</h2>', *tables, f"<p class=note>Accuracies in percent, the one to report in bold.</p><dl class=words>{legend}</dl>{told}"]


def list_architecture_tables(found: Found, explained: bool) -> list[str]:
    """What each architecture of a run cost and reached; which of its accuracies to report is said once on a page, `explained` where that was."""
    over = found["accuracy"]["over_architectures"] or {"per_architecture": {}}
    accuracies = [*over["per_architecture"].items(), ("mean", over)] if over["per_architecture"] else []
    flops = [(phase, name, counted) for phase, entries in found["flops"].items() for name, counted in entries.items()]
    tables: tuple[tuple[str, Mapping[str, Callable[..., str]], Sequence[tuple[Any, ...]], str], ...] = (
        ("Architectures: size, time and bytes per client and round", ARCHITECTURE_COLUMNS, [(entry,) for entry in found["by_architecture"]], ""),
        ("Architectures: mean accuracy of their clients, three ways", ACCURACY_COLUMNS, accuracies, WAYS_EXPLAINED_ABOVE if explained else WAYS_EXPLAINED),
        ("Architectures: floating-point operations per client and round, two for each multiply-add", FLOPS_COLUMNS, flops, ""))
    return [part for caption, columns, rows, note in tables if rows for part in (render_table(caption, columns, rows), note) if part]


def fold_details(recording: Recording, found: Found) -> list[str]:
    """What only some readers look for, each under a heading that opens it."""
    reached = [(target, cost) for target, cost in found["bytes"]["until_accuracy"].items() if cost is not None]
    model = {"global": "of the federation's own models", "generalization": "of the clients' models"}[found["bytes"]["until_accuracy_of"]]
    parts = {"Clients": render_clients(recording, found), "Ranks": render_ranks(recording, found),
             "Bytes until an accuracy": render_table(f"First evaluation at which the mean {model} reached it", TARGET_COLUMNS, reached) if reached else "",
             "Resolved job": f"<pre>{escape(recording.job_text)}</pre>"}
    return [f"<details><summary>{name}</summary>{inner}</details>" for name, inner in parts.items() if inner]


def render_clients(recording: Recording, found: Found) -> str:
    """A row for each client: what it is, what it holds, how often it answered, its accuracies and bytes."""
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
    refined = after_text(accuracy["refine"])
    headings = {"before": f"Before {refined} (%)", "generalization": f"After {refined} (%)", "personal": "Own images (%)"}
    for key, heading in headings.items():
        if (over := MEASURES[key].select(accuracy)) and over["mean"] is not None:
            columns[heading] = partial(lambda values, client: number_text(values[client]), over["per_client"])
    for direction in ("up", "down"):
        sent = found["bytes"]["per_client"][f"simulated_{direction}_bytes"]
        columns[f"Simulated {direction}"] = partial(lambda values, client: byte_text(values[client]), sent)
    return render_table("Last evaluation, bytes over all rounds", columns, ((client,) for client in range(recording.clients)))


def render_ranks(recording: Recording, found: Found) -> str:
    """Seconds of each rank, with what it waited of all its time; nothing for a single rank."""
    by_rank = found["seconds_by_rank"]
    if recording.ranks == 1 or not by_rank:
        return ""
    columns = {"Rank": lambda rank: str(rank)}
    columns |= {name.capitalize(): partial(lambda values, rank: duration_text(values[rank]), values) for name, values in by_rank.items()}
    if "idle" in by_rank and found["wall_s"]:
        columns["Waiting (%)"] = lambda rank: number_text(100 * by_rank["idle"][rank] / found["wall_s"])
    return render_table("Time of each rank, all rounds", columns, ((rank,) for rank in range(recording.ranks)))


def render_table(caption: str, columns: Mapping[str, Callable[..., str]], rows: Iterable[tuple]) -> str:
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


def _flops_text(count: float | None) -> str:
    return NOTHING if count is None else EngFormatter("FLOP", 2)(count)


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
    text = escape(mean_sd_text(**each["accuracy"][key]))
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


def _per_client(found: Found, direction: str) -> str:
    sent = found["bytes"]["per_client"][f"simulated_{direction}_bytes"]
    return byte_text(sum(sent) / max(1, len(sent)))


RUN_COLUMNS: dict[str, Callable[[Run], str]] = {
    "Run": _run_heading,
    **_with_after(lambda key: partial(_accuracy_cell, key), lambda run: escape(after_text(run.found["accuracy"]["refine"]))),
    "Bytes per client": lambda run: f"{_per_client(run.found, 'up')} up<small>{_per_client(run.found, 'down')} down</small>",
    "Time": lambda run: duration_text(run.found["wall_s"])}
SEED_COLUMNS: dict[str, Callable[[Found], str]] = {
    "Runs that differ only in seed": lambda each: f"{escape(each['label'])}<small>seeds {escape(', '.join(map(str, each['seeds'])))}</small>",
    **_with_after(lambda key: partial(_mean_sd, key), lambda each: escape(after_text(each["refine"]))),
    "Time (s)": lambda each: mean_sd_text(**each["wall_s"])}
WAY_COLUMNS: dict[str, Callable[[Found], str]] = {
    "Runs that differ only in seed": lambda each: escape(each["label"]),
    **{f"{told} (%)": partial(lambda way, each: mean_sd_text(**each["accuracy"][f"over_architectures_{way}"]), way) for way, told in WAYS.items()}}
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
    "Memory to train": lambda entry: byte_text(entry["memory_bytes"]),
    "Training": lambda entry: duration_text(entry["train_s"]),
    "Refining": lambda entry: duration_text(entry["refine_s"]),
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
