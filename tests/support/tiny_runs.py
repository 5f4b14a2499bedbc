"""Tiny runs for tests: in this process, on the ranks it belongs to, or as processes of their own under a hard time limit; and what they leave behind."""
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch

from hpcfl.algorithms import CONFIGS, PLANS
from hpcfl.federation.delivery import DERIVED
from hpcfl.files import trees
from hpcfl.runs import launch
from hpcfl.runs.signals import NUMBERS
from hpcfl.settings.job import Job, resolve
from hpcfl.training.group import OPTIMIZER
from hpcfl.tree import Tree
from hpcfl.wire import uplink
from hpcfl.wire.communicator import Alone, Communicator

LIMIT_S = 60                                                       # for a job that takes a few seconds
Tables = Mapping[str, Mapping[str, object]]

TINY: Tables = {
    "run": {"name": "tiny", "threads": 1, "device": "cpu"},
    "data": {"fraction": 0.15, "partition": "dirichlet", "alpha": 0.5, "minimum": 12, "public_fraction": 0.1},
    "models": {"names": ["mlp2", "cnn1"], "feature_size": 8},
    "federation": {"clients": 5, "rounds": 3, "participation": 0.6},
    "training": {"batch": 8},
    "evaluation": {"every": 2},
    "checkpoint": {"every": 100, "seconds": 0.0}}                    # when a checkpoint is written hangs on no clock
WIDTHS: Tables = {"models": {"names": ["cnn2_bn"], "sizes": [0, 1, 2]}}                # for methods with one global model
QUICK: dict[str, Tables] = {                                       # what makes an algorithm quick whose own defaults are not
    "fedvtc": {"algorithm": {"finetune_epochs": 1, "per_class": 4, "dm_classes": 3, "dm_samples": 4, "common_size": 8}},
    "gaussian": {"algorithm": {"common_size": 8}},
    "lg_fedavg": {"models": {"names": ["cnn2_bn", "cnn1"]}},         # with one common extractor
    "feddf": {"algorithm": {"steps": 4, "stage": 2}},
    "gefl": {"algorithm": {"generator_rounds": 2, "generator_epochs": 1, "latent": 4}},
    "gefl_f": {"algorithm": {"generator_rounds": 2, "generator_epochs": 1, "warmup_rounds": 1}, "models": {"names": ["cnn2_bn", "cnn1"]}},
    "fedtgp": {"algorithm": {"server_epochs": 3}},
    "fedgen": {"algorithm": {"server_steps": 3, "per_batch": 4, "hidden": 8}},
    "ccvr": {"algorithm": {"per_class": 4, "epochs": 2}},
    "heterofl": WIDTHS,
    "fedrolex": WIDTHS,
    "fedconv": {**WIDTHS, "data": {"fraction": 0.3, "public_fraction": 0.4},
                "algorithm": {"server_epochs": 3, "filter_epochs": 1, "first_epochs": 2, "server_finetune": 1, "aggregation_epochs": 1,
                              "server_lr": 0.01, "filter_lr": 0.01}}}
VARIANTS: dict[str, tuple[str, Tables]] = {                        # other ways through an algorithm: other phases, messages or client states
    "fedrolex, clients change their size": ("fedrolex", {"models": {"size_schedule": "rotate"}}),
    "fedconv, clients change their size": ("fedconv", {"models": {"size_schedule": "rotate"}, "algorithm": {"weights": "code", "server_finetune": 0}}),
    "fedavg, some do not answer": ("fedavg", {"federation": {"dropout": 0.3, "delay": "lognormal", "deadline": 2.0}}),
    "ccvr, each architecture": ("ccvr", {"algorithm": {"scope": "architecture", "covariance": "class_diag"}}),
    "lg_fedavg, the head": ("lg_fedavg", {"algorithm": {"shared": "head", "rest": "personal"}, "models": {"names": ["mlp2", "cnn1"]}}),
    "feddf, taught by averages": ("feddf", {"algorithm": {"teachers": "architectures", "ensemble": "probabilities"}}),
    "gefl, a gan that goes on training": ("gefl", {"algorithm": {"generator": "dcgan", "generator_rounds": 3, "width_g": 8, "width_d": 8, "pool": "round"}}),
    "gefl_f, diffusion": ("gefl_f", {"algorithm": {"generator": "ddpm", "steps": 4, "width": 8, "guidance": 2.0, "ddim_steps": 2}}),
    "fedvtc, common latent": ("fedvtc", {"algorithm": {"latent": "common", "vtc_sync": "none"}}),
    "fedvtc, sums": ("fedvtc", {"algorithm": {"statistics": "sums", "sigma_source": "learnable", "finetune": "every_round", "vtc_sync_every": 2}})}
CASES: dict[str, tuple[str, Tables]] = {name: (name, {}) for name in PLANS} | VARIANTS
AMPLIFYING = ("feddf", "fedvtc", "gefl", "gefl_f")                  # Adam turns the last bits of an average at once into steps of its rate
OF_THE_MOMENT = ("seconds/", "trace/", "rounds/wall_s", "bytes/transported", "clients/rank", "train/seconds",
                 "train/refine_seconds", "wire/")                  # metrics that differ between equal runs


def merged(*layers: Tables) -> dict[str, dict[str, object]]:
    """Tables laid over each other, key by key."""
    tables: dict[str, dict[str, object]] = {}
    for layer in layers:
        for section, table in layer.items():
            tables.setdefault(section, {}).update(table)
    return tables


def tiny(case: str, **changes: Mapping[str, object]) -> Job:
    """The tiny job of a case; `changes` are sections: tiny("fedavg", run={"deterministic": True})."""
    name, settings = CASES[case]
    return resolve(merged(TINY, QUICK.get(name, {}), settings, {"algorithm": {"name": name}}, changes), CONFIGS, case)


def write_job(folder: Path, job: Job) -> Path:
    """The job as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.toml"
    path.write_text(job.to_toml())
    return path


@contextmanager
def undisturbed() -> Iterator[None]:
    """What a run does to the process (its log, its threads, its signals) is undone."""
    log, threads = logging.getLogger("hpcfl"), torch.get_num_threads()
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    heard = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        yield
    finally:
        for handler in log.handlers:
            if handler not in handlers:
                handler.close()
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)
        torch.set_num_threads(threads)
        for number, handler in heard.items():
            signal.signal(number, handler)


def carry_out(job: Job, out: Path, comm: Communicator | None = None, resume: str | Path = "auto", may_differ: Sequence[str] = ()) -> Path:
    """The job in this process; alone unless `comm` says otherwise."""
    with undisturbed():
        return launch.run(job, comm or Communicator(Alone(), job.run.deterministic), out, str(resume), tuple(may_differ))


@dataclass(frozen=True)
class Outcome:
    """What a run folder holds at its last checkpoint."""

    server: Tree
    clients: dict[int, Tree]
    manifest: dict[str, object]
    metrics: dict[str, np.ndarray]


def checkpoint_of(folder: Path, rows: int) -> Path:
    """The checkpoint after so many rounds."""
    return folder / "checkpoints" / f"round-{rows:06d}"


def outcome(folder: Path) -> Outcome:
    """Read a run folder; the record by h5py alone, so that no code of ours hides what it holds."""
    checkpoint = folder / "checkpoints" / (folder / "LATEST").read_text().strip()
    clients = {int(client): _begun(state) for path in sorted(checkpoint.glob("rank-*.h5")) for client, state in trees.read_trees(path).items()}
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    metrics: dict[str, np.ndarray] = {}
    with h5py.File(folder / "metrics.h5", "r") as file:
        file.visititems(lambda name, item: metrics.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return Outcome(trees.read_trees(checkpoint / "server.h5")["server"], dict(sorted(clients.items())), manifest, metrics)


def _begun(state: Tree) -> Tree:
    """A client's state without optimiser state that is still zero, which a client has or lacks depending on who shares its Group."""
    return {path: leaf for path, leaf in state.items() if not path.startswith(f"{OPTIMIZER}/") or bool(leaf.any())}


def apart(one: Outcome, other: Outcome, tolerance: float | None = None) -> list[str]:
    """In what two outcomes differ: states and metrics by a single bit, or with a tolerance the states by more than that.

    With a tolerance what clients have of derived messages is left out: it is known by its bits.
    """
    states = [("server", one.server, other.server), *((f"client {k}", one.clients.get(k, {}), other.clients.get(k, {}))
                                                      for k in sorted(one.clients.keys() | other.clients.keys()))]
    found = []
    for owner, here, there in states:
        found += [f"{owner}: '{path}' is in only one" for path in sorted(here.keys() ^ there.keys())]
        found += [f"{owner}: '{path}' {_distance(here[path], there[path])}" for path in here if path in there and not _same(here[path], there[path], tolerance)]
    if tolerance is not None:
        return [line for line in found if f"'received/{DERIVED}" not in line]
    names = {name for name in one.metrics.keys() | other.metrics.keys() if not name.startswith(OF_THE_MOMENT)}
    for name in sorted(names):
        if name not in one.metrics or name not in other.metrics:
            found.append(f"metric '{name}' is in only one")
        elif one.metrics[name].tolist() != other.metrics[name].tolist() and one.metrics[name].tobytes() != other.metrics[name].tobytes():
            found.append(f"metric '{name}': {one.metrics[name]} and {other.metrics[name]}")
    found += [f"manifest: {key} is {one.manifest[key]} and {other.manifest[key]}" for key in ("rows", "version", "validation_accuracy")
              if one.manifest[key] != other.manifest[key]]
    return found


def _same(here: torch.Tensor, there: torch.Tensor, tolerance: float | None) -> bool:
    if here.shape != there.shape or here.dtype != there.dtype:
        return False
    if tolerance is None or not here.is_floating_point():
        return here.numpy().tobytes() == there.numpy().tobytes()
    return torch.allclose(here, there, rtol=tolerance, atol=tolerance, equal_nan=True)


def _distance(here: torch.Tensor, there: torch.Tensor) -> str:
    if here.shape != there.shape or here.dtype != there.dtype:
        return f"is {tuple(here.shape)} {here.dtype} and {tuple(there.shape)} {there.dtype}"
    return f"is up to {(here.double() - there.double()).abs().max():.2e} apart"


def of_one_precision(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Let sums travel unrounded where a method amplifies roundings, so that all else about them can be compared."""
    if CASES[case][0] in AMPLIFYING:
        monkeypatch.setattr(uplink, "choose_wire_type", lambda dtype: torch.float64)


def left_half_written(folder: Path) -> list[str]:
    """Temporary files that are still there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.part"))


class Started:
    """A running `hpcfl` in a process group of its own, which is killed at the end whatever happens."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]):
        self.folder, self.began_s = folder, time.monotonic()
        self.output = folder / "output.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    def ends(self) -> int:
        """The exit code."""
        return self.process.wait(timeout=LIMIT_S)

    def text(self) -> str:
        """What it printed so far."""
        return self.output.read_text(errors="replace")

    def rank(self, number: int) -> psutil.Process:
        """The process of one rank; without mpirun the process itself is rank 0."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        found = [process for process in family if process.environ().get("OMPI_COMM_WORLD_RANK", process.environ().get("PMI_RANK")) == str(number)]
        return found[0] if family else psutil.Process(self.process.pid)

    def reaches(self, name: str) -> None:
        """Wait for a file in the folder."""
        until = time.monotonic() + LIMIT_S
        while not (self.folder / name).exists():
            assert self.process.poll() is None and time.monotonic() < until, f"'{name}' did not come (exit code {self.process.poll()}):\n{self.text()}"
            time.sleep(0.02)

    def end_all(self) -> None:
        """SIGKILL to the launcher and all its ranks."""
        try:
            family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=LIMIT_S)
        self.process.wait(timeout=LIMIT_S)


@contextmanager
def started(folder: Path, *arguments: object, ranks: int = 0, fault: str = "", environment: Mapping[str, str] | None = None,
            launcher: Sequence[str] = ("mpirun",)) -> Iterator[Started]:
    """`hpcfl ARGUMENTS` in `folder`, under `launcher -n ranks` or (0) without. `fault` is Python that each process runs before it begins."""
    command = ["hpcfl", *map(str, arguments)]
    folder.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_COMM_WORLD", "PMIX_", "PMI_"))}
    inherited["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), inherited["PATH"]])
    if fault:
        (folder / "fault").mkdir(exist_ok=True)
        (folder / "fault" / "sitecustomize.py").write_text(fault)
        inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder / "fault"), inherited.get("PYTHONPATH")]))
    process = Started([*launcher, "-n", str(ranks), *command] if ranks else command, folder, inherited | (environment or {}))
    try:
        yield process
    finally:
        process.end_all()


def deterministic(job: Job) -> Job:
    """The job with bits that do not depend on the ranks."""
    return replace(job, run=replace(job.run, deterministic=True))
