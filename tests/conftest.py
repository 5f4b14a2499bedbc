"""What all tests share: one thread, the folder of real data, one voice for many ranks, and a note of what was skipped."""
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpcfl.training import compiling
from tests.support import slurm_cluster

REPOSITORY = Path(__file__).resolve().parent.parent

LONGEST = ("runs/test_slurm.py", "runs/test_faults.py", "runs/test_watchdog.py", "bench/test_gefl.py", "bench/test_fedconv.py", "runs/test_signals.py",
           "runs/test_guard.py", "runs/test_resume.py", "wire/test_two_hosts.py", "runs/test_power_cut.py", "doctor/test_examine.py",
           "runs/test_whole_runs.py", "federation/test_residency.py",
           "algorithms/test_every_algorithm.py")                   # begin first, so that no worker is left with one of them at the end

torch.set_num_threads(1)                                           # the ranks of one machine share its cores


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with real data sets: HPCFL_TEST_DATA, else ../shared/data beside the repository; skips where there is none."""
    named = os.environ.get("HPCFL_TEST_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if named and not folder.is_dir():
        pytest.fail(f"HPCFL_TEST_DATA = {named} is not a folder")
    if not folder.is_dir():
        pytest.skip("no real data: HPCFL_TEST_DATA is not set and ../shared/data does not exist")
    return folder


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has torch.compile use a backend, "inductor" where there is a C++ compiler for it, with nothing compiled yet."""

    def choose(backend: str) -> None:
        if backend == "inductor" and shutil.which("g++") is None:
            pytest.skip("torch.compile needs a C++ compiler, and there is no g++")
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        compiling.compile_forward.cache_clear()
    return choose


class Voices:
    """Under mpirun rank 0 reports, and any rank tells of a failure as it happens: the other ranks may never come to their summary."""

    def __init__(self, config: pytest.Config, rank: int, size: int) -> None:
        self.who = f"rank {rank} of {size}"
        if rank > 0:
            config.pluginmanager.unregister(name="terminalreporter")
            silence = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # closed by the clean-up
            config.add_cleanup(silence.close)
            config.pluginmanager.register(pytest.TerminalReporter(config, silence), "terminalreporter")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._tell(report, report.when)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell(report, "collection")

    def _tell(self, report: pytest.TestReport | pytest.CollectReport, stage: str) -> None:
        captured = "".join(f"\n-- {title}\n{content.rstrip()}" for title, content in report.sections)
        sys.stdout.write(f"\n== {self.who}: {report.nodeid} failed in its {stage}\n{report.longreprtext}{captured}\n")
        sys.stdout.flush()


class Notes:
    """Of every test that was looked at, whether it ran and why not: a line each, which `tests.support.skipped` reads when all suites are over."""

    def __init__(self, path: str) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped and isinstance(report.longrepr, tuple) else None
            with open(self.path, "a", encoding="utf-8") as file:
                print(json.dumps((report.nodeid, reason)), file=file)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device, skipped where torch sees none")
    config.addinivalue_line("markers", "slurm: brings up a SLURM of its own, skipped where SLURM is not installed or root is missing")
    config.addinivalue_line("markers", "costly: takes long and is worth it; left out by -m 'not costly' while one works on something else")
    rank = 0
    if config.getoption("--with-mpi"):
        from mpi4py import MPI
        rank = MPI.COMM_WORLD.rank
        config.pluginmanager.register(Voices(config, rank, MPI.COMM_WORLD.size))
    if "HPCFL_TEST_NOTES" in os.environ and rank == 0 and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Notes(os.environ["HPCFL_TEST_NOTES"]))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under mpirun every rank imports what it collects: files without a test for several ranks are passed over."""
    if config.getoption("--with-mpi") and collection_path.suffix == ".py" and "pytest.mark.mpi" not in collection_path.read_text(encoding="utf-8"):
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if absent := [name for name in LONGEST if not (REPOSITORY / "tests" / name).is_file()]:
        raise pytest.UsageError(f"tests/conftest.py: LONGEST names {', '.join(absent)}, which is not there; wanted the files that take longest")
    order = {REPOSITORY / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if config.getoption("--with-mpi"):
        alone = [item for item in items if not item.get_closest_marker("mpi")]
        items[:] = [item for item in items if item.get_closest_marker("mpi")]
        config.hook.pytest_deselected(items=alone)
    for item in items:
        for mark in item.iter_markers("mpi"):
            if mark.args or mark.kwargs.keys() - {"min_size"}:
                raise pytest.UsageError(f"{item.nodeid}: the mark mpi takes min_size=N and nothing else; the plugin silently ignores other keywords")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if item.get_closest_marker("slurm") and (reason := slurm_cluster.missing()):
        pytest.skip(reason)
