"""What tests of runs share: the command line without MPI, a run that nobody disturbed, and a small disk."""
import shutil
import subprocess
from pathlib import Path

import pytest

from hpcfl import cli
from hpcfl.wire import communicator
from tests.support.tiny_runs import carry_out, deterministic, tiny, undisturbed, write_job


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A job, its job file, and the folder of a run that nobody disturbed, in one process; any number of ranks gives the same bits."""
    folder = tmp_path_factory.mktemp("whole")
    job = deterministic(tiny("fedvtc", checkpoint={"every": 1, "keep": 2}))
    return job, write_job(folder, job), carry_out(job, folder / "run")


@pytest.fixture
def hpcfl(monkeypatch, capsys):
    """The command line in this process, without MPI: (exit code, what it printed)."""
    monkeypatch.setattr(communicator, "connect", lambda deterministic=False, **how: communicator.Communicator(communicator.Alone(), deterministic))

    def call(*arguments: object) -> tuple[int, str]:
        with undisturbed(), pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err
    return call


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system of so many bytes; skips where that takes rights that we do not have."""
    made = []

    def make(size: int) -> Path:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = shutil.which("mount")
        if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs rights that this process does not have")
        made.append(disk)
        return disk
    yield make
    for disk in made:
        subprocess.run(["umount", "--lazy", disk], check=True)
