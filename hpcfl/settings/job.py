"""Job: an experiment as frozen dataclasses, read from TOML.

What a setting may name is asked of `choices`, the tables that carry it out. They stand on higher floors, so whoever has a job read hands them in.
"""
import codecs
import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcfl.errors import JobError
from hpcfl.settings import annotations, synonyms
from hpcfl.settings.fields import Choices
from hpcfl.settings.sections import SECTIONS, Checkpoint, Data, Evaluation, Federation, Models, Residency, Run, Timeouts, Training
from hpcfl.wording import did_you_mean, nearest

MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True)
class Job:
    """The resolved experiment. `algorithm` is the Config of the algorithm called `algorithm_name`."""

    run: Run
    data: Data
    models: Models
    federation: Federation
    residency: Residency
    training: Training
    algorithm: Any
    evaluation: Evaluation
    checkpoint: Checkpoint
    timeouts: Timeouts
    algorithm_name: str

    def tables(self) -> dict[str, dict[str, Any]]:
        """Every setting spelled out: {section: {key: value}}."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        settings = {entry.name: getattr(self.algorithm, entry.name) for entry in dataclasses.fields(self.algorithm) if entry.init}
        sections["algorithm"] = {"name": self.algorithm_name, **{key: annotations.to_job_value(value) for key, value in settings.items()}}
        return sections

    def digest(self) -> str:
        """Eight hex digits that change with any setting."""
        return hashlib.blake2b(json.dumps(self.tables(), sort_keys=True).encode(), digest_size=4).hexdigest()

    def to_toml(self) -> str:
        """The resolved job as a job file that reads back equal."""
        lines: list[str] = []
        for section, table in self.tables().items():
            lines += [f"[{section}]", *(toml_line(key, value) for key, value in table.items() if value is not None), ""]
        return "\n".join(lines)


RENAMED = {                                                        # what settings were called -> what they are called: no job file may say it, runs recorded it
    "data.size": "data.image_size", "data.test": "data.test_fraction", "data.validation": "data.validation_fraction", "data.values": "data.normalization",
    "models.features": "models.feature_size", "federation.server": "federation.server_rank",
    "clients.residency": "residency.location", "clients.chunk": "residency.chunk", "clients.folder": "residency.folder"}


def load(path: str | Path, choices: Choices, overrides: Sequence[str] = ()) -> Job:
    """Read a job file; `overrides` are strings "section.key=value", the value in TOML notation or a bare word.

    An override of algorithm.name has the file's setting tried with another method: of the file's [algorithm] that keeps what it knows too.

    Raises: JobError for a file that cannot be read, a section or key that does not exist (with the nearest match) and a value that is not allowed.
    """
    path = Path(path)
    tables = _read(path)
    changes = [_override(override) for override in overrides]
    for section, key, value in changes:
        if not isinstance(tables.setdefault(section, {}), dict):
            raise JobError(f"{path}: '{section}' is a value, wanted a section [{section}]")
        if (section, key) == ("algorithm", "name"):
            gone = _settings(tables[section].get("name"), choices) - _settings(value, choices)
            tables[section] = {name: setting for name, setting in tables[section].items() if name not in gone}
    for section, key, value in changes:
        tables[section][key] = value
    return resolve(tables, choices, str(path))


def recall(path: str | Path, choices: Choices) -> Job:
    """The job that a run recorded in its folder, perhaps under an earlier version. Raises: JobError as `load` does."""
    return resolve(read_recorded(_read(Path(path))), choices, str(path))


def read_recorded(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tables of a job that a run recorded, perhaps under an earlier version, in the words of this one.

    Every setting has the name that it has today; outside [algorithm] one that did not exist yet has its default, which is what the run did.
    """
    found: dict[str, dict[str, Any]] = {name: json.loads(json.dumps(dataclasses.asdict(kind()))) for name, kind in SECTIONS.items() if kind is not None}
    for section, table in tables.items():
        for key, value in table.items():
            today, _, name = RENAMED.get(f"{section}.{key}", f"{section}.{key}").partition(".")
            found.setdefault(today, {})[name] = value
    return found


def refuse_old_names(names: Iterable[str], where: str) -> None:
    """Raises: JobError that says what settings "section.key" are called, where any has been renamed."""
    if told := [f"{name} is called {RENAMED[name]}" for name in names if name in RENAMED]:
        raise JobError(f"{where}: {', '.join(told)}")


def resolve(tables: Mapping[str, Any], choices: Choices, where: str = "job") -> Job:
    """A Job from nested tables. Raises JobError as `load` does."""
    refuse_old_names((f"{section}.{key}" for section, table in tables.items() if isinstance(table, Mapping) for key in table), where)
    known = {name: tuple(annotations.settings(kind, where, choices)) if kind else ("name",) for name, kind in SECTIONS.items()}
    for section, table in tables.items():
        if section in SECTIONS and not isinstance(table, Mapping):
            raise JobError(f"{where}: '{section}' is {table!r}, wanted a section [{section}]")
        if section not in SECTIONS:
            meant = (synonyms.suggest_section(section, SECTIONS) if isinstance(table, Mapping) else "") or synonyms.suggest_setting("", section, table, known)
            unknown = f"unknown section [{section}]" if isinstance(table, Mapping) else f"'{section}' stands in no section"
            raise JobError(f"{where}: {unknown}{meant or ';'} There are {', '.join(f'[{name}]' for name in SECTIONS)}")
    sections = {name: _section(kind, tables.get(name, {}), name, where, known, choices) for name, kind in SECTIONS.items() if kind is not None}
    algorithm, configs = dict(tables.get("algorithm", {})), choices["algorithm"]
    name = algorithm.pop("name", None)
    if name is None:
        raise JobError(f"{where}: {'names no method' if tables else 'is empty'}; wanted at least a section [algorithm] with "
                       f"name = one of {_list_text(configs)} "
                       "(algorithm.name)")
    if not isinstance(name, str) or name not in configs:
        raise JobError(f"{where}: algorithm.name = {name!r} is not known{did_you_mean(nearest(str(name), configs))}; there are {_list_text(configs)}")
    return Job(**sections, algorithm=_section(configs[name], algorithm, "algorithm", where, known, choices, f" of {name}"), algorithm_name=name)


def find_differences(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings in which two resolved jobs differ, as "section.key"."""
    def flat(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        return {f"{section}.{key}": json.dumps(value) for section, table in tables.items() for key, value in table.items()}
    a, b = flat(one), flat(other)
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def toml_line(key: str, value: Any) -> str:
    """A line of a job file; the value alone where there is no key."""
    text = _string(value)
    return f"{key if key.isascii() else _string(key)} = {text}" if key else text


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path.read_bytes()))
    except OSError as error:
        raise JobError(f"{path}: cannot read the job file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:                  # of tomllib, or of a number or a list that Python does not take
        raise JobError(f"{path}: not a TOML file: {error}") from None


def _section(section_type: type, table: Mapping[str, Any], section: str, where: str, known: Mapping[str, Sequence[str]], choices: Choices,
             owner: str = "") -> Any:
    """A section from its table; `known` are the keys of all sections, `owner` whose section it is, for words to the user."""
    settings = annotations.settings(section_type, f"{where}: [{section}]{owner}", choices)
    for key, value in table.items():
        if key not in settings:
            meant = synonyms.suggest_setting(section, key, value, {**known, section: tuple(settings)})
            raise JobError(f"{where}: unknown key {section}.{key}{meant or ';'} [{section}]{owner} has {', '.join(settings) or 'no settings'}")
    checked = {}
    for key, setting in settings.items():
        value = table.get(key, setting.default)
        if value is dataclasses.MISSING:
            raise JobError(f"{where}: {section}.{key} is not set and has no default; wanted {setting.kind.allowed}")
        try:
            checked[key] = setting.kind.check(f"{section}.{key}", value)
        except JobError as error:
            raise JobError(f"{where}: {error}" + ("" if key in table else f", also for the default that [{section}]{owner} has for it")) from None
    try:
        return section_type(**checked)
    except (ValueError, TypeError) as error:                       # of its own __post_init__
        raise JobError(f"{where}: [{section}]{owner} is not allowed: {error}") from error


def _settings(method: Any, choices: Choices) -> set[str]:
    """The settings of a method, none if there is no such method."""
    configs = choices["algorithm"]
    return set(annotations.settings(configs[method], f"algorithm '{method}'", choices)) if isinstance(method, str) and method in configs else set()


def _override(override: str) -> tuple[str, str, Any]:
    name, equals, value = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise JobError(f"--set {override!r}: wanted section.key=value, for example --set training.lr=0.01")
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return section, key, value                                 # a bare word is a string


def _text(content: bytes) -> str:
    """The text of a job file. Raises ValueError for another encoding than UTF-8."""
    marked = next((name for mark, name in MARKS.items() if content.startswith(mark)), "UTF-16 or binary" if b"\0" in content else None)
    if marked:
        raise ValueError(f"it is {marked}, wanted UTF-8: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")                         # with a byte order mark or without
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"byte 0x{content[error.start]:02x} in line {line} is no UTF-8: save it as UTF-8") from None


def _string(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")              # the one character that JSON may hold as it is and TOML may not


def _list_text(configs: Iterable[str]) -> str:
    return ", ".join(sorted(configs))
