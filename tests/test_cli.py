"""The command line says what is wrong before anything starts, and what it only reads or lists is a table or JSON."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcfl import cli
from hpcfl.errors import CheckpointError, JobError
from hpcfl.wire.communicator import connect
from tests.support.tiny_runs import carry_out, outcome, tiny, undisturbed, write_job


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return carry_out(tiny("standalone"), tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def sliced(tmp_path_factory) -> Path:
    return carry_out(tiny("heterofl", models={"names": ["cnn5"], "sizes": [0, 1]}, data={"fraction": 0.5}), tmp_path_factory.mktemp("sliced") / "run")


def ending(*arguments: object) -> int:
    with undisturbed(), pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments)])
    return end.value.code


@pytest.mark.parametrize("command", [["run", "job.toml"], ["bench", "w1"]])
def test_ranks_that_cannot_see_each_other_end_with_exit_code_3_and_no_traceback(command, monkeypatch, capsys):
    connect()                                                      # MPI starts before it is told of ranks that are not there
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.setenv("PMI_SIZE", "3")
    assert ending(*command) == 3
    error = capsys.readouterr().err
    assert error.startswith("hpcfl: mpirun of MPICH or Intel MPI started 3 ranks (PMI_SIZE), but each sees only itself") and "Traceback" not in error


IN_A_SHELL = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "PMI_SIZE": ""}        # srun --pty bash with 4 tasks


@pytest.fixture
def in_a_shell_of_srun(monkeypatch):
    connect()                                                      # MPI starts before it is told of ranks that are not there
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in IN_A_SHELL.items():
        monkeypatch.setenv(name, value)


def test_in_a_shell_that_srun_started_a_run_is_refused_with_the_way_out_which_works(in_a_shell_of_srun, tmp_path, capsys):
    job = write_job(tmp_path, tiny("standalone"))
    assert ending("run", job, "--out", tmp_path / "run") == 3
    error = capsys.readouterr().err
    assert "srun started 4 ranks (SLURM_STEP_NUM_TASKS), but each sees only itself" in error and error.endswith(
        "To run one process here, whatever launched the shell that it is started from: hpcfl run --alone\n")
    assert ending("run", job, "--out", tmp_path / "run", "--alone") == 0
    assert outcome(tmp_path / "run").manifest["rows"] == 3


def test_in_a_shell_that_srun_started_a_dry_run_and_the_doctor_speak(in_a_shell_of_srun, tmp_path, monkeypatch, capsys):
    job = write_job(tmp_path, tiny("standalone"))
    assert ending("run", job, "--dry-run") == 0
    assert "# client 4: mlp2 on rank 0" in (told := capsys.readouterr().out) and "# hpcfl run would not start here: srun started 4 ranks" in told
    assert ending("run", job, "--dry-run", "--alone") == 0 and "would not start" not in capsys.readouterr().out
    assert ending("doctor", "--out", tmp_path / "run") == 3 and "hpcfl run --alone" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setenv("SLURM_PROCID", "2")
    for command in (["run", job, "--dry-run"], ["doctor"]):
        assert ending(*command) == 0 and capsys.readouterr().out == "", "one of them speaks for all"


def test_threads_wait_without_spinning_from_before_torch_is_loaded(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert ending("--version") == 0 and os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert ending("--version") == 0 and os.environ["OMP_WAIT_POLICY"] == "active", "the user's word counts"
    loaded = subprocess.run([sys.executable, "-c", "import sys, hpcfl.cli; print('torch' in sys.modules)"], capture_output=True, text=True, check=True)
    assert loaded.stdout == "False\n"


def test_ctrl_c_ends_a_command_that_only_reads_with_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt
    monkeypatch.setattr("hpcfl.data.store.list_data_sets", interrupted)
    assert ending("data", "list") == 130 and capsys.readouterr().err == "hpcfl: interrupted from the keyboard\n"


def test_data_sets_are_listed_as_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path))
    assert ending("data", "list") == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "status", "train", "test", "classes", "image", "MB"]
    digits = next(line for line in lines if line.startswith("digits"))
    assert digits.split()[:6] == ["digits", "embedded", "1437", "360", "10", "1x8x8"] and digits.endswith("8, 9; 139 to 147 training images each")
    assert digits.index("1437") + 4 == heading.index("train") + 5, "numbers end under the end of their heading"
    assert next(line for line in lines if line.startswith("cifar10 ")).endswith("hpcfl data get cifar10")
    assert ending("data", "list", "--json") == 0
    assert {row["name"]: row["status"] for row in json.loads(capsys.readouterr().out)}["mnist"] == "absent"


def test_information_in_a_runs_models_is_a_table_or_json(sliced, capsys):
    assert ending("information", sliced, "--images", 120) == 0
    head, headings, *rows = capsys.readouterr().out.splitlines()
    assert "logits on 120 test images" in head and headings.split()[:2] == ["model", "architecture"]
    assert [row.split()[0] for row in rows] == ["full", "pruned", "sliced"]
    assert ending("information", sliced, "--images", 120, "--output", "features", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "features" and found["images"] == 120 and len(found["models"]) == len(rows)


def test_information_needs_a_global_model_and_a_checkpoint(finished, sliced, tmp_path, capsys):
    one_model = carry_out(tiny("standalone", models={"names": ["cnn1"]}), tmp_path / "one_model")
    (tmp_path / "begun").mkdir()
    shutil.copy(sliced / "job.toml", tmp_path / "begun")
    for folder, code, said in [(one_model, JobError.exit_code, "algorithm 'standalone' keeps no global model"), (finished, JobError.exit_code, "standalone"),
                               (tmp_path / "begun", CheckpointError.exit_code, "has no checkpoint yet"), (tmp_path, JobError.exit_code, "has no job.toml")]:
        assert ending("information", folder) == code
        error = capsys.readouterr().err
        assert error.startswith("hpcfl: ") and said in error and "Traceback" not in error


