"""labels: runs put together that differ only in seed, and a name for each that tells it from all others: the method, then what differs within it."""
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpcfl.report.recording import Recording
from hpcfl.settings.job import find_differences

Group = list[Recording]
NAMES = ("run.name", "run.seed")                                   # settings that change nothing but names, and the one that groups are made over
METHOD = ("algorithm.name", "data.public_fraction")                # what follows from the method


def group_by_seed(recordings: Sequence[Recording]) -> list[Group]:
    """The runs in groups that differ in nothing but seed (and name) and got equally far; a seed met again opens another group."""
    groups: dict[tuple[str, int], Group] = {}
    for recording in recordings:
        tables = {section: {key: value for key, value in table.items() if f"{section}.{key}" not in NAMES} for section, table in recording.job.items()}
        settings = f"{recording.rounds} {json.dumps(tables, sort_keys=True, default=str)}"
        again = sum(recording.seed == other.seed for (known, _), group in groups.items() if known == settings for other in group)
        groups.setdefault((settings, again), []).append(recording)
    return list(groups.values())


def label_groups(recordings: Sequence[Recording]) -> dict[str, Group]:
    """Groups of runs that differ only in seed by their label, in the order of the runs.

    A label is the method and the settings in which its runs differ; where that is not enough also the rounds, run.name, or the folder.
    """
    groups = group_by_seed(recordings)
    shared = {key for key in _find_differing(recordings) if key.startswith("data.") and key not in METHOD}  # runs on other data are not to be compared unsaid
    kin = {method: [recording for recording in recordings if recording.algorithm == method] for method in {one.algorithm for one in recordings}}
    keys = {method: sorted(shared | _find_differing(runs)) for method, runs in kin.items()}
    labels = [_settings(group[0], keys[group[0].algorithm]) for group in groups]
    for tell in (lambda run: f"{run.rounds} rounds finished", lambda run: run.name, lambda run: run.folder.name, lambda run: str(run.folder)):
        seen = Counter(labels)
        labels = [f"{label}, {tell(group[0])}" if seen[label] > 1 and _differ(tell, label, labels, groups) else label
                  for label, group in zip(labels, groups, strict=True)]
    return dict(zip(labels, groups, strict=True))


def _differ(tell: Callable[[Recording], str], label: str, labels: Sequence[str], groups: Sequence[Group]) -> bool:
    """Whether what is told of the groups of one label tells any of them apart."""
    return len({tell(group[0]) for other, group in zip(labels, groups, strict=True) if other == label}) > 1


def _find_differing(recordings: Sequence[Recording]) -> set[str]:
    return {key for other in recordings[1:] for key in find_differences(recordings[0].job, other.job)}.difference(NAMES)


def _settings(recording: Recording, keys: Sequence[str]) -> str:
    short = Counter(key.partition(".")[2] for key in keys)
    parts = [(key, *key.split(".", 1)) for key in keys]
    told = [f"{name if short[name] == 1 else key} {_text(recording.job[section][name])}" for key, section, name in parts
            if name in recording.job.get(section, {})]
    return ", ".join([recording.algorithm, *told])


def _text(value: Any) -> str:
    """A setting's value as a job file has it, without quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + " ".join(map(_text, value)) + "]"
    return " ".join(f"{key}={_text(each)}" for key, each in value.items()) if isinstance(value, Mapping) else str(value)
