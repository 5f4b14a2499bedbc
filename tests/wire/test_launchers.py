"""What launchers say in the environment and of themselves, and what Open MPI is given so that it starts."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hpcfl
from hpcfl.errors import EnvironmentFault
from hpcfl.wire import launchers
from hpcfl.wire.communicator import connect
from hpcfl.wire.launchers import Launch, ask_mpirun, find_libraries, make_lone_environment, parse_whole_number, read_launch


@pytest.mark.parametrize(("environment", "launch"), [
    ({}, None), ({"SLURM_NTASKS": "4"}, None), ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}, Launch("srun", "SLURM_NTASKS", 4, 3)),
    ({"PMI_SIZE": "2", "PMI_RANK": "1", "SLURM_STEP_NUM_TASKS": "1"}, Launch("mpirun of MPICH or Intel MPI", "PMI_SIZE", 2, 1))])
def test_what_a_launcher_says(environment, launch):
    assert read_launch(environment) == launch


@pytest.mark.parametrize("account", [True, False])
def test_mpi_starts_where_home_is_not_set_and_tmpdir_takes_no_files(account, tmp_path, monkeypatch):
    """Open MPI ends a process without HOME before hpcfl could say anything."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(launchers.tempfile, "gettempdir", lambda: str(tmp_path))
    if not account:                                                # a user number of a container's that no account belongs to
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setenv("TMPDIR", "/proc")                           # where nobody can make a file: Open MPI dies of it
    connect(checked=False)
    assert os.environ["TMPDIR"] == str(tmp_path)
    assert os.environ["HOME"] == (os.path.expanduser("~") if account else str(tmp_path))


def test_where_no_folder_takes_temporary_files_that_is_said(monkeypatch):
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/proc']")
    monkeypatch.setattr(launchers.tempfile, "gettempdir", none)
    with pytest.raises(EnvironmentFault, match=r"no folder takes temporary files \(No usable .*\); set TMPDIR to one that does"):
        connect()


@pytest.mark.parametrize(("text", "number"), [(None, 0), ("", 0), ("many", 0), ("-4", 0), ("8(x2)", 0), (" 12 ", 12), ("0", 0)])
def test_what_is_no_whole_number_is_not_set(text, number):
    assert parse_whole_number(text) == number


@pytest.mark.parametrize(("script", "told"), [
    ("echo 'mpirun (Open MPI)   5.0.11'; echo more", "mpirun (Open MPI) 5.0.11"), ("echo HYDRA >&2; exit 1", "HYDRA"),
    ("exit 0", "mpirun of a kind that does not tell"), ("exec sleep 9", "timed out")])
def test_mpirun_is_asked_what_it_is(script, told, tmp_path, monkeypatch):
    program = tmp_path / "mpirun"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert told in ask_mpirun(limit_s=1 if "sleep" in script else 60)


def test_without_mpirun_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_mpirun(60) == ""


@pytest.mark.parametrize(("mpirun", "libraries"), [
    ("mpirun (Open MPI) 5.0.11", ("Open MPI",)), ("HYDRA build details:", ("MPICH", "MVAPICH")), ("Intel(R) MPI Library for Linux", ("Intel",)),
    ("mpirun of a kind that does not tell", ())])
def test_an_mpirun_launches_the_libraries_of_its_family(mpirun, libraries):
    assert find_libraries(mpirun) == libraries


def test_a_process_started_beside_a_rank_is_none_and_imports_the_same_hpcfl(tmp_path, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    environment = make_lone_environment()
    assert read_launch(environment) is None and environment["PYTHONPATH"].endswith(f":{tmp_path}") and environment["PATH"] == os.environ["PATH"]
    code = "import hpcfl; print(hpcfl.__file__)"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert Path(ended.stdout.strip()) == Path(hpcfl.__file__)
