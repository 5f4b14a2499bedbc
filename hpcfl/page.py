"""page: the report of one or several runs as one HTML file without scripts or outside resources, and its figures as PNG files."""
import base64
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter

from hpcfl import figures, pictures
from hpcfl.inspect import byte_text
from hpcfl.job import differences
from hpcfl.pictures import NOTHING, Picture, counted, number_text, seconds_text
from hpcfl.recording import Recording
from hpcfl.storage import replacing
from hpcfl.report import WAYS, same_but_seed, summary

EXPLANATION = ("Accuracies in percent. Generalization: each client on the whole test set, the mean over clients and below it the lowest and the "
               "highest client. Global: the federation's own models on the whole test set. Personal: each client on held-out samples of its own "
               "distribution. Absent classes: only test samples of classes that the client has no training sample of. Over architectures: the mean over "
               "architectures of the mean accuracy of their clients on the whole test set, and below it the same with each architecture at the "
               "evaluation that the validation parts of its clients select.")
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
tbody th { font-weight: 600; } td small { display: block; color: var(--muted); }
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


def write(recordings: Sequence[Recording], out: Path) -> Path:
    """Write out/figures/*.png and out/report.html for the runs, in their order; returns the path of the page. Raises: OSError."""
    groups, facts = _labelled(recordings), {recording.folder: summary(recording) for recording in recordings}
    titles = {recording.folder: f"{label}, seed {recording.seed}" for label, group in groups.items() for recording in group}
    several = len(recordings) > 1
    body = [f"<h1>{f'hpcfl report: {len(recordings)} runs' if several else 'hpcfl report'}</h1>", f"<p class=note>{EXPLANATION}</p>",
            _table("Last evaluation", RUN_COLUMNS, ((facts[recording.folder], titles[recording.folder]) for recording in recordings))]
    if several:
        repeated = [([facts[recording.folder] for recording in group], label) for label, group in groups.items() if len(group) > 1]
        body += [_table("Mean ± sample standard deviation over seeds", SEED_COLUMNS, repeated) if repeated else "",
                 _gallery(pictures.comparison(groups), out / "figures")]
    for index, recording in enumerate(recordings):
        title, found = titles[recording.folder], facts[recording.folder]
        prefix = f"{index + 1:02d}-{_slug(title)}-" if several else ""
        body += [_headline(recording, found, title, index), *_architectures(found), _gallery(pictures.of_run(recording, prefix), out / "figures"),
                 *_folded(recording, found)]
    page = FRAME.format(title=escape("hpcfl report: " + ", ".join(groups)), style=STYLE, body="\n".join(body))
    return keep(out / "report.html", page.encode())


def keep(path: Path, content: bytes) -> Path:
    """Replace a file whole; returns its path. Raises: OSError."""
    with replacing(path, lambda error: OSError(error.errno, error.strerror)) as draft:
        draft.write(content)
    return path


def _labelled(recordings: Sequence[Recording]) -> dict[str, list[Recording]]:
    """Runs that differ only in seed, by a label: run.name, and where that is not enough the settings that differ, or the folder."""
    groups = same_but_seed(recordings)
    keys = sorted({key for other in recordings for key in differences(recordings[0].job, other.job)} - {"run.name", "run.seed"})
    labels = [_name(group) for group in groups]
    for describe in (partial(_name_and_settings, keys=keys), lambda group: f"{_name(group)} {group[0].folder.name}",
                     lambda group: str(group[0].folder)):
        labels = [describe(group) if labels.count(label) > 1 else label for label, group in zip(labels, groups, strict=True)]
    return dict(zip(labels, groups, strict=True))


def _name(group: Sequence[Recording]) -> str:
    return os.path.commonprefix([recording.name for recording in group]).rstrip("-_. ") or group[0].name


def _name_and_settings(group: Sequence[Recording], keys: Sequence[str]) -> str:
    values = ((key.split("."), group[0].job) for key in keys)
    settings = ", ".join(f"{name} {job[section][name]}" for (section, name), job in values if name in job.get(section, {}))
    return f"{_name(group)} ({settings[:60]})" if settings else _name(group)


def _architectures(found: dict[str, Any]) -> list[str]:
    over = found["accuracy"]["over_architectures"] or {"per_architecture": {}}
    accuracies = [*over["per_architecture"].items(), ("mean", over)] if over["per_architecture"] else []
    flops = [(phase, name, counted) for phase, entries in found["flops"].items() for name, counted in entries.items()]
    tables = (("Architectures: size, time and bytes per client and round", ARCHITECTURE_COLUMNS, [(entry,) for entry in found["by_architecture"]]),
              ("Architectures: mean accuracy of their clients, three ways", ACCURACY_COLUMNS, accuracies),
              ("Architectures: floating-point operations per client and round, two for each multiply-add", FLOPS_COLUMNS, flops))
    return [_table(*described, rows) for *described, rows in tables if rows]


def _over(found: dict[str, Any]) -> dict[str, float | None]:
    return found["accuracy"]["over_architectures"] or dict.fromkeys(WAYS)


def _flops(count: float | None) -> str:
    return NOTHING if count is None else EngFormatter("FLOP", 2)(count)


def _duration(seconds: float | None) -> str:
    return NOTHING if seconds is None else seconds_text(seconds)


def _spread(found: dict[str, Any] | None) -> str:
    if not found or found["mean"] is None:
        return NOTHING
    return f"{number_text(found['mean'])}<small>{number_text(found['min'])} – {number_text(found['max'])}</small>"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{number_text(value)} %"


def _per_client(found: dict[str, Any], direction: str) -> str:
    sent = found["bytes"]["per_client"][f"simulated_{direction}_bytes"]
    return byte_text(sum(sent) / max(1, len(sent)))


RUN_COLUMNS: dict[str, Callable[[dict[str, Any], str], str]] = {
    "Run": lambda found, title: escape(title.rpartition(", seed")[0]),
    "Algorithm": lambda found, _: escape(found["algorithm"]),
    "Seed": lambda found, _: escape(str(found["seed"])),
    "Rounds": lambda found, _: str(found["rounds"]),
    "Status": lambda found, _: escape(found["status"].split(":")[0]),
    "Before fine-tuning (%)": lambda found, _: _spread(found["accuracy"].get("before_finetune")),
    "Generalization (%)": lambda found, _: _spread(found["accuracy"]["generalization"]),
    "Global (%)": lambda found, _: _spread(found["accuracy"].get("global")),
    "Personal (%)": lambda found, _: _spread(found["accuracy"]["personal"]),
    "Absent classes (%)": lambda found, _: _spread(found["accuracy"]["absent_classes"]),
    "Over architectures (%)": lambda found, _: f"{number_text(_over(found)['final'])}<small>selected {number_text(_over(found)['selected'])}</small>",
    "Bytes per client": lambda found, _: f"{_per_client(found, 'up')} up<small>{_per_client(found, 'down')} down</small>",
    "Time": lambda found, _: seconds_text(found["wall_s"])}
SEED_COLUMNS: dict[str, Callable[[list[dict[str, Any]], str], str]] = {
    "Runs that differ only in seed": lambda group, title: escape(title),
    "Seeds": lambda group, _: ", ".join(escape(str(found["seed"])) for found in group),
    "Before fine-tuning (%)": lambda group, _: _mean_sd([found["accuracy"].get("before_finetune", {}).get("mean") for found in group]),
    "Generalization (%)": lambda group, _: _mean_sd([found["accuracy"]["generalization"]["mean"] for found in group]),
    "Lowest client (%)": lambda group, _: _mean_sd([found["accuracy"]["generalization"]["min"] for found in group]),
    "Personal (%)": lambda group, _: _mean_sd([found["accuracy"]["personal"]["mean"] for found in group]),
    "Absent classes (%)": lambda group, _: _mean_sd([found["accuracy"]["absent_classes"]["mean"] for found in group]),
    **{f"Over architectures: {told.lower()} (%)": partial(lambda way, group, _: _mean_sd([_over(found)[way] for found in group]), way)
       for way, told in WAYS.items()},
    "Time (s)": lambda group, _: _mean_sd([found["wall_s"] for found in group])}
TARGET_COLUMNS: dict[str, Callable[[str, dict[str, int]], str]] = {
    "Mean generalization of at least (%)": lambda target, _: target,
    "Rounds": lambda _, cost: str(cost["rounds"]),
    "Simulated bytes": lambda _, cost: byte_text(cost["simulated_bytes"]),
    "Transported bytes": lambda _, cost: byte_text(cost["transported_bytes"])}
ARCHITECTURE_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "Architecture": lambda entry: escape(entry["architecture"]),
    "Clients": lambda entry: str(entry["clients"]),
    "Parameters": lambda entry: NOTHING if entry["parameters"] is None else f"{entry['parameters']:,}",
    "Forward pass of an image": lambda entry: _flops(entry["forward_flops"]),
    "Memory to train": lambda entry: NOTHING if entry["memory_bytes"] is None else byte_text(entry["memory_bytes"]),
    "Training": lambda entry: _duration(entry["train_s"]),
    "Refining": lambda entry: _duration(entry["refine_s"]),
    "Simulated up": lambda entry: byte_text(entry["simulated_up_bytes"]),
    "Simulated down": lambda entry: byte_text(entry["simulated_down_bytes"]),
    "Generalization (%)": lambda entry: number_text(entry["generalization"]),
    "Personal (%)": lambda entry: number_text(entry["personal"])}
ACCURACY_COLUMNS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "Architecture": lambda name, _: escape(name),
    **{f"{told} (%)": partial(lambda way, _, entry: number_text(entry[way]), way) for way, told in WAYS.items()},
    "Rounds until the selected": lambda _, entry: str(entry.get("selected_rounds") or NOTHING)}
FLOPS_COLUMNS: dict[str, Callable[[str, str, dict[str, float | None]], str]] = {
    "Phase": lambda phase, *_: escape(phase),
    "Architecture": lambda _, name, __: escape(name),
    "Training": lambda _, __, counted: _flops(counted["training_flops_per_round"]),
    "Refining": lambda _, __, counted: _flops(counted["refining_flops_per_round"])}
WORDS = ("Algorithm", "Status", "Seeds", "Architecture")


def _headline(recording: Recording, found: dict[str, Any], title: str, index: int) -> str:
    accuracy, sent = found["accuracy"], found["bytes"]
    means = {"Generalization": ("generalization", f"sd over clients {number_text(accuracy['generalization']['sd'])}"),
             "Before fine-tuning": ("before_finetune", "the same clients"),
             "Global": ("global", "the federation's own models"), "Personal": ("personal", "own distribution"),
             "Absent classes": ("absent_classes", "not in the client's data")}
    idle = "wall clock" if found["idle_share"] is None else f"waiting {number_text(100 * found['idle_share'])} %"
    idle += "" if found["load_balance"] is None or recording.ranks == 1 else f", busiest rank {number_text(found['load_balance'], 2)} of the mean"
    tiles = {**{name: (_percent(accuracy[key]["mean"]), note) for name, (key, note) in means.items() if key in accuracy},
             "Simulated bytes": (byte_text(sent["simulated_up_bytes"] + sent["simulated_down_bytes"]),
                                 f"{byte_text(sent['simulated_up_bytes'])} up, {byte_text(sent['simulated_down_bytes'])} down"),
             "Transported bytes": (byte_text(sent["transported_bytes"]), f"between {counted(recording.ranks, 'rank')}"),
             "Time": (seconds_text(found["wall_s"]), idle)}
    if conditions := found["conditions"]:
        share = 100 * conditions["answered"] / max(1, conditions["asked"])
        tiles["Answers"] = (_percent(share), f"{conditions['dropped']} dropped out, {conditions['late']} late; {seconds_text(conditions['simulated_s'])} simulated")
    cells = "".join(f"<div><dt>{name}</dt><dd>{value[0]}<small>{value[1]}</small></dd></div>" for name, value in tiles.items())
    facts = f"{recording.algorithm} on {found['data']}, {counted(recording.clients, 'client')}, {counted(recording.ranks, 'rank')}, " \
            f"{counted(recording.rounds, 'round')} finished, status: {recording.status}, folder {recording.folder}"
    return f'<h2 id="run-{index + 1}">{escape(title)}</h2><p class=note>{escape(facts)}</p><dl class=tiles>{cells}</dl>'


def _folded(recording: Recording, found: dict[str, Any]) -> list[str]:
    reached = [(target, cost) for target, cost in found["bytes"]["until_accuracy"].items() if cost is not None]
    parts = {"Clients": _clients(recording, found), "Ranks": _ranks(recording, found), "Bytes until an accuracy": _table("First evaluation that reached it", TARGET_COLUMNS, reached)
             if reached else "", "Resolved job": f"<pre>{escape(recording.job_text)}</pre>"}
    return [f"<details><summary>{name}</summary>{inner}</details>" for name, inner in parts.items() if inner]


def _clients(recording: Recording, found: dict[str, Any]) -> str:
    counts, accuracy = recording.arrays.get("partition/train"), found["accuracy"]
    described = recording.part("clients")
    columns = {"Client": lambda client: str(client)}
    memory, forward = described.pop("memory_bytes", None), described.pop("forward_flops", None)
    columns |= {name.capitalize(): partial(lambda values, client: escape(str(values[client])), values) for name, values in sorted(described.items())}
    if memory is not None:
        columns["Memory to train"] = lambda client: byte_text(memory[client])
    if forward is not None:
        columns["Forward pass of an image"] = lambda client: _flops(forward[client])
    if counts is not None:
        columns["Training samples"] = lambda client: str(counts[client].sum())
        columns["Absent classes"] = lambda client: str((counts[client] == 0).sum())
    if (answered := recording.arrays.get("conditions/answered")) is not None:
        columns["Answers"] = lambda client: f"{(answered[:, client] == 1).sum()} of {(answered[:, client] >= 0).sum()}"
    for heading, key in (("Before fine-tuning (%)", "before_finetune"), ("Generalization (%)", "generalization"), ("Personal (%)", "personal")):
        if accuracy.get(key, {}).get("mean") is not None:
            columns[heading] = partial(lambda values, client: number_text(values[client]), accuracy[key]["per_client"])
    for direction in ("up", "down"):
        sent = found["bytes"]["per_client"][f"simulated_{direction}_bytes"]
        columns[f"Simulated {direction}"] = partial(lambda values, client: byte_text(values[client]), sent)
    return _table("Last evaluation, bytes over all rounds", columns, ((client,) for client in range(recording.clients)))


def _ranks(recording: Recording, found: dict[str, Any]) -> str:
    """Seconds of each rank, with what it waited of all its time; nothing for a single rank."""
    by_rank = found["seconds_by_rank"]
    if recording.ranks == 1 or not by_rank:
        return ""
    columns = {"Rank": lambda rank: str(rank)}
    columns |= {name.capitalize(): partial(lambda values, rank: seconds_text(values[rank]), values) for name, values in by_rank.items()}
    if "idle" in by_rank and found["wall_s"]:
        columns["Waiting (%)"] = lambda rank: number_text(100 * by_rank["idle"][rank] / found["wall_s"])
    return _table("Seconds of each rank, all rounds", columns, ((rank,) for rank in range(recording.ranks)))


def _table(caption: str, columns: dict[str, Callable[..., str]], rows: Iterable[tuple]) -> str:
    kind = {name: " class=word" if name in WORDS else "" for name in columns}
    head = "".join(f"<th scope=col{kind[name]}>{escape(name)}</th>" for name in columns)
    body = []
    for row in rows:
        first, *others = (f"{kind[name]}>{cell(*row)}" for name, cell in columns.items())
        body.append(f"<tr><th scope=row{first}</th>" + "".join(f"<td{other}</td>" for other in others) + "</tr>")
    return f'<div class=scroll tabindex=0 role=region aria-label="{caption}"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>' \
           f"<tbody>{''.join(body)}</tbody></table></div>"


def _gallery(pictures: Iterable[Picture], folder: Path) -> str:
    return f"<div class=figures>{''.join(_figure(picture, folder) for picture in pictures)}</div>"


def _figure(picture: Picture, folder: Path) -> str:
    light, dark = figures.png(picture.draw, figures.LIGHT), figures.png(picture.draw, figures.DARK)
    keep(folder / f"{picture.name}.png", light)
    width, height = (int.from_bytes(light[start:start + 4], "big") for start in (16, 20))              # of the PNG header: no jump while loading
    sources = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in (light, dark)]
    return f'<figure><figcaption>{escape(picture.title)}</figcaption><picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">' \
           f'<img src="{sources[0]}" width={width} height={height} alt="{escape(picture.alt)}"></picture></figure>'


def _mean_sd(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    return f"{number_text(np.mean(known))} ± {number_text(np.std(known, ddof=1))}" if len(known) > 1 else number_text(known[0])


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")[:80]
