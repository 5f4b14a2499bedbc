"""What all tests share: one thread, the folder of real data, and one voice for many ranks."""
import functools
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


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device, skipped where torch sees none")
    config.addinivalue_line("markers", "slurm: brings up a SLURM of its own, skipped where SLURM is not installed or root is missing")
    if config.getoption("--with-mpi"):
        from mpi4py import MPI
        config.pluginmanager.register(Voices(config, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_slurm.py")  # first: it takes longest, and most of it is waiting
    for item in items:
        for mark in item.iter_markers("mpi"):
            if mark.args or mark.kwargs.keys() - {"min_size"}:
                raise pytest.UsageError(f"{item.nodeid}: the mark mpi takes min_size=N and nothing else; the plugin silently ignores other keywords")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if item.get_closest_marker("slurm") and (reason := slurm_cluster.missing()):
        pytest.skip(reason)
