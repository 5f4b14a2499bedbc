"""Job: an experiment as frozen dataclasses, read from TOML; the one place where defaults live."""
import codecs
import dataclasses
import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcfl.errors import JobError
from hpcfl.settings import annotations, synonyms
from hpcfl.settings.fields import choice, flag, folder_name, integer, integers, real, reals, selection, text, words

MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True)
class Run:
    name: str = folder_name("run")                                 # names the folder under runs/
    seed: int = integer(0, 0)                                      # the root of every Stream
    device: str = choice("auto", "cpu", "cuda")                    # auto: cuda where torch sees one
    compile: str = choice("auto", "on", "off")                     # auto: where the expected steps pay for the compilation
    deterministic: bool = flag(False)                              # bit-identical on any number of ranks (CPU), at a measured price
    threads: int = integer(0, 0)                                   # per rank; 0: its part of the host's cores, as many as its models keep busy


@dataclass(frozen=True)
class Data:
    name: str = text("digits")                                     # embedded, nothing to download
    fraction: float = real(1.0, 0.0, 1.0, above=True)              # share of the official training set that the federation owns
    partition: str = choice("iid", "dirichlet", "shards", "disjoint", "lognormal")
    alpha: float = real(0.1, 0.0, above=True)                      # dirichlet: small is skewed
    classes_per_client: int = integer(2, 1)                        # shards
    spread: float = real(1.0, 0.0)                                 # lognormal: standard deviation of log sizes
    minimum: int = integer(10, 1)                                  # smallest shard that dirichlet and lognormal may give a client
    validation_fraction: float = real(0.1, 0.0, 0.5)               # of each client's shard, and of the public images; the only part that may select anything
    test_fraction: float = real(0.1, 0.0, 0.5)                     # of each client's shard; personal accuracy
    public_fraction: float = real(0.0, 0.0, 0.9)                   # of the federation's images, kept by the server, owned by no client
    image_size: int = integer(0, 0)                                # pixels of an edge to which images are resized; 0: as they are
    normalization: str = choice("symmetric", "unit", "standard")   # classifier input: [-1, 1], [0, 1], or per-channel mean 0 and sd 1


@dataclass(frozen=True)
class Models:
    names: tuple[str, ...] = words("cnn1")                         # which entry a client has: see assignment
    assignment: str = choice("cyclic", "blocks")                   # client k has entry k mod m; or equally many clients in a row have each, the last the rest
    sizes: tuple[int, ...] = integers(0)                           # size class e of client k mod m: hidden widths times shrinkage^e
    shrinkage: float = real(0.75, 0.0, 1.0, above=True)
    size_schedule: str = choice("fixed", "rotate", "random")       # whether size classes (or budgets) move on by a client, or are drawn, each round
    memory_mb: tuple[float, ...] = reals()                         # training memory of client k mod m; not empty: the largest size class that fits
    feature_size: int = integer(64, 0)                             # common feature size p; 0: each model's own
    norm: str = choice("batch", "group")                           # GroupNorm has no running statistics to average
    feature_relu: bool = flag(True)                                # whether features end in a ReLU: one switch for all, or their means do not compare


@dataclass(frozen=True)
class Federation:
    clients: int = integer(10, 1)                                  # whatever the ranks
    rounds: int = integer(10, 1)
    participation: float = real(1.0, 0.0, 1.0, above=True)         # share of the clients in each round's cohort
    server_rank: str = choice("shared", "dedicated")               # shared: rank 0 hosts clients too
    dropout: float = real(0.0, 0.0, 1.0)                           # simulated: probability that a client of the cohort does not answer in a round
    delay: str = choice("none", "exponential", "lognormal")        # simulated: the time that a client takes to answer in a round
    delay_mean: float = real(1.0, 0.0, above=True)                 # simulated seconds
    delay_spread: float = real(1.0, 0.0)                           # lognormal: standard deviation of the logarithm
    deadline: float = real(0.0, 0.0)                               # simulated seconds after which an answer is not used; 0: the server waits


@dataclass(frozen=True)
class Residency:
    location: str = choice("device", "host", "disk")               # where the states of clients lie that are not at work; no result depends on it
    chunk: int = integer(0, 0)                                     # clients of one architecture that are on the device and trained together at most; 0: all
    folder: str = text("")                                         # disk: where; it may be local to the node; empty: the system's temporary folder


@dataclass(frozen=True)
class Training:
    epochs: int = integer(1, 1)                                    # local epochs per round
    batch: int = integer(32, 1)
    augment: tuple[str, ...] = selection("crop_flip", "augmix", "autoaugment", last=("mixup", "cutmix"))        # of real images, in this order
    mix_alpha: float = real(1.0, 0.0, above=True)                  # mixup, cutmix: the share of each image is drawn from Beta(alpha, alpha)
    optimizer: str = choice("sgd", "adam")
    lr: float = real(0.05, 0.0, above=True)
    momentum: float = real(0.0, 0.0, 1.0)                          # sgd
    weight_decay: float = real(0.0, 0.0)
    clip: float = real(0.0, 0.0)                                   # gradient norm per client; 0: no clipping
    engine: str = choice("auto", "sequential", "vmap")             # auto: sequential on CPU, vmap on CUDA
    precision: str = choice("auto", "float32", "bfloat16")         # auto: float32, on a GPU without TF32


@dataclass(frozen=True)
class Evaluation:
    every: int = integer(1, 1)                                     # rounds; the last round of a phase is always evaluated
    personal: bool = flag(True)
    batch: int = integer(250, 1)                                   # images per forward pass; the results do not depend on it
    flops: bool = flag(False)                                      # count the clients' operations in the first round of each phase: up to 3 times as long


@dataclass(frozen=True)
class Checkpoint:
    every: int = integer(10, 1)                                    # rounds; the last round is always kept
    seconds: float = real(60.0, 0.0)                               # also behind the round that passes so many, earlier where it costs little; 0: never
    keep: int = integer(2, 1)                                      # newest checkpoints kept


@dataclass(frozen=True)
class Timeouts:
    collective: float = real(0.0, 0.0)                             # seconds that a rank may wait for another before the run is ended; 0: for ever
    heartbeat: float = real(60.0, 0.0)                             # seconds between the lines that a long round prints; 0: none


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
            lines += [f"[{section}]", *(f"{_quote(key)} = {_toml(value)}" for key, value in table.items() if value is not None), ""]
        return "\n".join(lines)


SECTIONS = {"run": Run, "data": Data, "models": Models, "federation": Federation, "residency": Residency, "training": Training,
            "algorithm": None, "evaluation": Evaluation, "checkpoint": Checkpoint, "timeouts": Timeouts}
RENAMED = {                                                        # what settings were called -> what they are called: no job file may say it, runs recorded it
    "data.size": "data.image_size", "data.test": "data.test_fraction", "data.validation": "data.validation_fraction", "data.values": "data.normalization",
    "models.features": "models.feature_size", "federation.server": "federation.server_rank",
    "clients.residency": "residency.location", "clients.chunk": "residency.chunk", "clients.folder": "residency.folder"}


def load(path: str | Path, configs: Mapping[str, type], overrides: Sequence[str] = ()) -> Job:
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
            gone = _settings(tables[section].get("name"), configs) - _settings(value, configs)
            tables[section] = {name: setting for name, setting in tables[section].items() if name not in gone}
    for section, key, value in changes:
        tables[section][key] = value
    return resolve(tables, configs, str(path))


def recall(path: str | Path, configs: Mapping[str, type]) -> Job:
    """The job that a run recorded in its folder, perhaps under an earlier version. Raises: JobError as `load` does."""
    return resolve(read_recorded(_read(Path(path))), configs, str(path))


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


def resolve(tables: Mapping[str, Any], configs: Mapping[str, type], where: str = "job") -> Job:
    """A Job from nested tables; `configs` maps algorithm names to their Config dataclass. Raises JobError as `load` does."""
    refuse_old_names((f"{section}.{key}" for section, table in tables.items() if isinstance(table, Mapping) for key in table), where)
    known = {name: tuple(annotations.list_setting_types(kind, where)) if kind else ("name",) for name, kind in SECTIONS.items()}
    for section, table in tables.items():
        if section in SECTIONS and not isinstance(table, Mapping):
            raise JobError(f"{where}: '{section}' is {table!r}, wanted a section [{section}]")
        if section not in SECTIONS:
            meant = (synonyms.suggest_section(section, SECTIONS) if isinstance(table, Mapping) else "") or synonyms.suggest_setting("", section, table, known)
            unknown = f"unknown section [{section}]" if isinstance(table, Mapping) else f"'{section}' stands in no section"
            raise JobError(f"{where}: {unknown}{meant or ';'} There are {', '.join(f'[{name}]' for name in SECTIONS)}")
    sections = {name: _section(kind, tables.get(name, {}), name, where, known) for name, kind in SECTIONS.items() if kind is not None}
    algorithm = dict(tables.get("algorithm", {}))
    name = algorithm.pop("name", None)
    if name is None:
        raise JobError(f"{where}: {'names no method' if tables else 'is empty'}; wanted at least a section [algorithm] with "
                       f"name = one of {_list_text(configs)} "
                       "(algorithm.name)")
    if not isinstance(name, str) or name not in configs:
        raise JobError(f"{where}: algorithm.name = {name!r} is not known{_suggest(str(name), configs)}; there are {_list_text(configs)}")
    return Job(**sections, algorithm=_section(configs[name], algorithm, "algorithm", where, known, f" of {name}"), algorithm_name=name)


def find_differences(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings in which two resolved jobs differ, as "section.key"."""
    def flat(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        return {f"{section}.{key}": json.dumps(value) for section, table in tables.items() for key, value in table.items()}
    a, b = flat(one), flat(other)
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path.read_bytes()))
    except OSError as error:
        raise JobError(f"{path}: cannot read the job file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:                  # of tomllib, or of a number or a list that Python does not take
        raise JobError(f"{path}: not a TOML file: {error}") from None


def _section(section_type: type, table: Mapping[str, Any], section: str, where: str, known: Mapping[str, Sequence[str]], owner: str = "") -> Any:
    """A section from its table; `known` are the keys of all sections, `owner` whose section it is, for words to the user."""
    kinds = annotations.list_setting_types(section_type, f"{where}: [{section}]{owner}")
    for key, value in table.items():
        if key not in kinds:
            meant = synonyms.suggest_setting(section, key, value, {**known, section: tuple(kinds)})
            raise JobError(f"{where}: unknown key {section}.{key}{meant or ';'} [{section}]{owner} has {', '.join(kinds) or 'no settings'}")
    defaults = {entry.name: _default(entry) for entry in dataclasses.fields(section_type) if entry.init}
    checked = {}
    for key, kind in kinds.items():
        value = table.get(key, defaults[key])
        if value is dataclasses.MISSING:
            raise JobError(f"{where}: {section}.{key} is not set and has no default; wanted {kind.allowed}")
        try:
            checked[key] = kind.check(f"{section}.{key}", value)
        except JobError as error:
            raise JobError(f"{where}: {error}" + ("" if key in table else f", also for the default that [{section}]{owner} has for it")) from None
    try:
        return section_type(**checked)
    except (ValueError, TypeError) as error:                       # of its own __post_init__
        raise JobError(f"{where}: [{section}]{owner} is not allowed: {error}") from error


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default


def _settings(method: Any, configs: Mapping[str, type]) -> set[str]:
    """The settings of a method, none if there is no such method."""
    return set(annotations.list_setting_types(configs[method], f"algorithm '{method}'")) if isinstance(method, str) and method in configs else set()


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


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")                # the one character that JSON may hold as it is and TOML may not


def _quote(key: str) -> str:
    return key if key.isascii() else _toml(key)


def _list_text(configs: Mapping[str, type]) -> str:
    return ", ".join(sorted(configs))


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
