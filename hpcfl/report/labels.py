"""labels: runs put together that differ only in seed, and a name for each that tells it from all others: the method, then what differs within it."""
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpcfl.report.recording import Recording
from hpcfl.settings.job import find_differences

Repetitions = list[Recording]                                      # runs that differ only in seed
NAMES = ("run.name", "run.seed")                                   # settings that change nothing but names, and the one that groups are made over
METHOD = ("algorithm.name", "data.public_fraction")                # what follows from the method


def group_by_seed(recordings: Sequence[Recording]) -> list[Repetitions]:
    """The runs in groups that differ in nothing but seed (and name), saw the same data and got equally far; a seed met again opens another group."""
    groups: dict[tuple[str, int], Repetitions] = {}
    for recording in recordings:
        tables = {section: {key: value for key, value in table.items() if f"{section}.{key}" not in NAMES} for section, table in recording.job.items()}
        settings = f"{recording.rounds} {recording.data_sha256} {json.dumps(tables, sort_keys=True, default=str)}"
        again = sum(recording.seed == other.seed for (known, _), group in groups.items() if known == settings for other in group)
        groups.setdefault((settings, again), []).append(recording)
    return list(groups.values())


def label_groups(recordings: Sequence[Recording]) -> dict[str, Repetitions]:
    """Groups of runs that differ only in seed by their label, in the order of the runs.

    A label is the method and the settings in which its runs differ, with the digest of the data where one name of data stood for several; where that is
    not enough also the rounds, run.name, or the folder.
    """
    groups = group_by_seed(recordings)
    shared = {key for key in _find_differing(recordings) if key.startswith("data.") and key not in METHOD}  # runs on other data are not to be compared unsaid
    kin = {method: [recording for recording in recordings if recording.algorithm == method] for method in {one.algorithm for one in recordings}}
    keys = {method: sorted(shared | _find_differing(runs)) for method, runs in kin.items()}
    digests: dict[str, set[str | None]] = {}
    for recording in recordings:
        digests.setdefault(_data_name(recording), set()).add(recording.data_sha256)
    labels = [_settings(group[0], keys[group[0].algorithm]) + (_digest_text(group[0]) if len(digests[_data_name(group[0])]) > 1 else "") for group in groups]
    for tell in (lambda run: f"{run.rounds} rounds finished", lambda run: run.name, lambda run: run.folder.name, lambda run: str(run.folder)):
        seen = Counter(labels)
        labels = [f"{label}, {tell(group[0])}" if seen[label] > 1 and _differ(tell, label, labels, groups) else label
                  for label, group in zip(labels, groups, strict=True)]
    return dict(zip(labels, groups, strict=True))


def _data_name(recording: Recording) -> str:
    return str(recording.job.get("data", {}).get("name"))


def _digest_text(recording: Recording) -> str:
    """Which data a name stood for: the beginning of their SHA-256, as the page has it."""
    return f", data {recording.data_sha256[:12]}" if recording.data_sha256 else ", data not noted"


def _differ(tell: Callable[[Recording], str], label: str, labels: Sequence[str], groups: Sequence[Repetitions]) -> bool:
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
