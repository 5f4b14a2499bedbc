"""Job: an experiment as frozen dataclasses, read from TOML; the one place where defaults live."""
import dataclasses
import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcfl.errors import JobError
from hpcfl.kinds import choice, flag, integer, integers, real, reals, selection, text, words


@dataclass(frozen=True)
class Run:
    name: str = text("run")                                        # names the folder under runs/
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
    validation: float = real(0.1, 0.0, 0.5)                        # of each client's shard; the only part that may select anything
    test: float = real(0.1, 0.0, 0.5)                              # of each client's shard; personal accuracy
    public_fraction: float = real(0.0, 0.0, 0.9)                   # of the federation's images, kept by the server, owned by no client
    size: int = integer(0, 0)                                      # resize images to size x size; 0: as they are
    values: str = choice("symmetric", "unit", "standard")          # classifier input: [-1, 1], [0, 1], or per-channel mean 0 and sd 1


@dataclass(frozen=True)
class Models:
    names: tuple[str, ...] = words("cnn1")                         # which entry a client has: see assignment
    assignment: str = choice("cyclic", "blocks")                   # client k has entry k mod m; or equally many clients in a row have each, the last the rest
    sizes: tuple[int, ...] = integers(0)                           # size class e of client k mod m: hidden widths times shrinkage^e
    shrinkage: float = real(0.75, 0.0, 1.0, above=True)
    size_schedule: str = choice("fixed", "rotate", "random")       # whether size classes (or budgets) move on by a client, or are drawn, each round
    memory_mb: tuple[float, ...] = reals()                         # training memory of client k mod m; not empty: the largest size class that fits
    features: int = integer(64, 0)                                 # common feature size p; 0: each model's own
    norm: str = choice("batch", "group")                           # GroupNorm has no running statistics to average
    feature_relu: bool = flag(True)                                # whether features end in a ReLU: one switch for all, or their means do not compare


@dataclass(frozen=True)
class Federation:
    clients: int = integer(0, 0)                                   # 0: one per rank
    rounds: int = integer(10, 1)
    participation: float = real(1.0, 0.0, 1.0, above=True)         # share of the clients in each round's cohort
    server: str = choice("shared", "dedicated")                    # shared: rank 0 hosts clients too
    dropout: float = real(0.0, 0.0, 1.0)                           # simulated: probability that a client of the cohort does not answer in a round
    delay: str = choice("none", "exponential", "lognormal")        # simulated: the time that a client takes to answer in a round
    delay_mean: float = real(1.0, 0.0, above=True)                 # simulated seconds
    delay_spread: float = real(1.0, 0.0)                           # lognormal: standard deviation of the logarithm
    deadline: float = real(0.0, 0.0)                               # simulated seconds after which an answer is not used; 0: the server waits


@dataclass(frozen=True)
class Clients:
    residency: str = choice("device", "host", "disk")              # where the states of clients lie that are not at work; no result depends on it
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
    clients: Clients
    training: Training
    algorithm: Any
    evaluation: Evaluation
    checkpoint: Checkpoint
    timeouts: Timeouts
    algorithm_name: str

    def tables(self) -> dict[str, dict[str, Any]]:
        """Every setting spelled out: {section: {key: value}}."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        sections["algorithm"] = {"name": self.algorithm_name, **dataclasses.asdict(self.algorithm)}
        return sections

    def digest(self) -> str:
        """Eight hex digits that change with any setting."""
        return hashlib.blake2b(json.dumps(self.tables(), sort_keys=True).encode(), digest_size=4).hexdigest()

    def to_toml(self) -> str:
        """The resolved job as a job file that reads back equal."""
        lines: list[str] = []
        for section, table in self.tables().items():
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()), ""]
        return "\n".join(lines)


SECTIONS = {"run": Run, "data": Data, "models": Models, "federation": Federation, "clients": Clients, "training": Training,
            "algorithm": None, "evaluation": Evaluation, "checkpoint": Checkpoint, "timeouts": Timeouts}


def load(path: str | Path, configs: Mapping[str, type], overrides: Sequence[str] = ()) -> Job:
    """Read a job file; `overrides` are strings "section.key=value", the value in TOML notation or a bare word.

    An override of algorithm.name has the file's setting tried with another method: of the file's [algorithm] that keeps what it knows too.

    Raises: JobError for a file that cannot be read, a section or key that does not exist (with the nearest match) and a value that is not allowed.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise JobError(f"{path}: cannot read the job file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not a TOML file: {error}") from None
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


def resolve(tables: Mapping[str, Any], configs: Mapping[str, type], where: str = "job") -> Job:
    """A Job from nested tables; `configs` maps algorithm names to their Config dataclass. Raises JobError as `load` does."""
    for section, table in tables.items():
        if section not in SECTIONS:
            raise JobError(f"{where}: unknown section [{section}]{_nearest(section, SECTIONS)}")
        if not isinstance(table, Mapping):
            raise JobError(f"{where}: '{section}' is {table!r}, wanted a section [{section}]")
    sections = {name: _section(kind, tables.get(name, {}), name, where) for name, kind in SECTIONS.items() if kind is not None}
    algorithm = dict(tables.get("algorithm", {}))
    name = algorithm.pop("name", None)
    if not isinstance(name, str) or name not in configs:
        raise JobError(f"{where}: algorithm.name = {name!r} is not known{_nearest(str(name), configs)}; there are {', '.join(sorted(configs))}")
    return Job(**sections, algorithm=_section(configs[name], algorithm, "algorithm", where), algorithm_name=name)


def differences(one: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings in which two resolved jobs differ, as "section.key"."""
    def flat(tables):
        return {f"{section}.{key}": json.dumps(value) for section, table in tables.items() for key, value in table.items()}
    a, b = flat(one), flat(other)
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _section(kind: type, table: Mapping[str, Any], section: str, where: str) -> Any:
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            raise JobError(f"{where}: unknown key {section}.{key}{_nearest(key, fields)}")
    checked = {}
    for key, value in table.items():
        try:
            checked[key] = fields[key].metadata["kind"].check(f"{section}.{key}", value)
        except JobError as error:
            raise JobError(f"{where}: {error}") from None
    return kind(**checked)


def _settings(method: Any, configs: Mapping[str, type]) -> set[str]:
    """The settings of a method, none if there is no such method."""
    return {entry.name for entry in dataclasses.fields(configs[method])} if isinstance(method, str) and method in configs else set()


def _override(override: str) -> tuple[str, str, Any]:
    name, equals, value = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise JobError(f"--set {override!r}: wanted section.key=value, for example --set training.lr=0.01")
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, value                                 # a bare word is a string


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
