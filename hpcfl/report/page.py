"""page: the report of one or several runs as one HTML file without scripts or outside resources, and its figures as PNG and SVG files."""
import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from hpcfl.errors import JobError
from hpcfl.files.atomic import replacing
from hpcfl.report import canvas, page_tables, pictures
from hpcfl.report.labels import label_groups
from hpcfl.report.measures import MEASURES, Found, after_text
from hpcfl.report.page_tables import Run
from hpcfl.report.pictures import Picture
from hpcfl.report.recording import Recording, read
from hpcfl.report.summary import summarise
from hpcfl.wording import byte_text, count_text, duration_text, number_text, percent_text

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
    body = [f"<h1>{f'hpcfl report: {len(runs)} runs' if several else 'hpcfl report'}</h1>", _contents(runs) if several else "",
            *page_tables.list_results_tables(runs, found)]
    if several:
        body += ['<h2 id="comparison">Comparison</h2>', _gallery(pictures.compare_runs(groups), out / "figures")]
    for run in runs:
        prefix = f"{run.number:02d}-{_slug(run.recording.algorithm)}-" if several else ""
        body += [_headline(run, several), *page_tables.list_architecture_tables(run.found, explained=page_tables.WAYS_EXPLAINED in body),
                 _gallery(pictures.picture_run(run.recording, prefix), out / "figures"), *page_tables.fold_details(run.recording, run.found)]
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


def _headline(run: Run, several: bool) -> str:
    recording, found, accuracy, sent = run.recording, run.found, run.found["accuracy"], run.found["bytes"]
    known = {key: values for key, measure in MEASURES.items() if (values := measure.select(accuracy)) and values["mean"] is not None}
    tiles = {name: (percent_text(known[key]["mean"]), note) for key, (name, note) in _names(accuracy).items() if key in known}
    idle = "wall clock" if found["idle_share"] is None else f"waiting {percent_text(100 * found['idle_share'])}"
    idle += "" if found["load_balance"] is None or recording.ranks == 1 else f", busiest rank {number_text(found['load_balance'], 2)} of the mean"
    tiles |= {"Simulated bytes": (byte_text(sent["simulated_up_bytes"] + sent["simulated_down_bytes"]),
                                  f"{byte_text(sent['simulated_up_bytes'])} up, {byte_text(sent['simulated_down_bytes'])} down"),
              "Transported bytes": (byte_text(sent["transported_bytes"]), f"between {count_text(recording.ranks, 'rank')}"),
              "Time": (duration_text(found["wall_s"]), idle)}
    if conditions := found["conditions"]:
        share = 100 * conditions["answered"] / max(1, conditions["asked"])
        tiles["Answers"] = (percent_text(share), f"{conditions['dropped']} dropped out, {conditions['late']} late; "
                                                 f"{duration_text(conditions['simulated_s'])} simulated")
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


def _gallery(pictures: Iterable[Picture], folder: Path) -> str:
    return f"<div class=figures>{''.join(_figure(picture, folder) for picture in pictures)}</div>"


def _figure(picture: Picture, folder: Path) -> str:
    light, dark = canvas.to_png(picture.draw, canvas.LIGHT), canvas.to_png(picture.draw, canvas.DARK)
    replace_file(folder / f"{picture.name}.png", light)
    replace_file(folder / f"{picture.name}.svg", canvas.to_svg(picture.draw))
    width, height = (int.from_bytes(light[start:start + 4], "big") for start in (16, 20))              # of the PNG header: no jump while loading
    sources = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in (light, dark)]
    return f'<figure><figcaption>{escape(picture.title)}</figcaption><picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">' \
           f'<img src="{sources[0]}" width={width} height={height} alt="{escape(picture.alt)}"></picture></figure>'


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")[:20]
