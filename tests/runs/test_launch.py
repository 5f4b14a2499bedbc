"""A run says what it is before it trains and how it ended, and what cannot be is refused before anything starts."""
import re

import pytest

from hpcfl.report import summary
from hpcfl.runs import launch
from hpcfl.wire import communicator
from tests.support.tiny_runs import carry_out, started, tiny, undisturbed, write_job


def test_ranks_that_do_not_see_each_other_do_not_start(tmp_path):
    path = write_job(tmp_path, tiny("standalone"))
    with started(tmp_path, "run", path, "--out", tmp_path / "run", environment={"OMPI_COMM_WORLD_SIZE": "4"}) as job:
        assert job.ends() == 3, job.text()
    assert "mpirun of Open MPI started 4 ranks (OMPI_COMM_WORLD_SIZE), but each sees only itself" in job.text() and not (tmp_path / "run").exists()


def test_data_that_are_not_there_say_how_to_get_them(hpcfl, tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "data"))
    for name, way_out in (("mnist", "get it with: hpcfl data get mnist [--from DIR]"), ("own", "hpcfl data import own --npz FILE"),
                          ("digit", "did you mean 'digits'?")):
        code, text = hpcfl("run", write_job(tmp_path, tiny("standalone", data={"name": name})), "--out", tmp_path / name)
        assert code == 4 and f"data set '{name}' is not in the cache {tmp_path / 'data'}" in text and way_out in text


def test_clients_without_images_are_a_matter_of_the_data(hpcfl, tmp_path):
    code, text = hpcfl("run", write_job(tmp_path, tiny("standalone")), "--set", "federation.clients=100", "--out", tmp_path / "run")
    assert code == 4 and "100 clients with data.minimum = 12 images each need 1200, there are" in text


def test_a_run_in_python_takes_its_folder_as_a_word_too_and_ends_with_the_way_to_its_report(tmp_path, capsys):
    folder = tmp_path / "a run"
    with undisturbed():
        assert launch.run(tiny("standalone"), communicator.Communicator(communicator.Alone()), str(folder), "auto") == folder
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"done after [\d.]+ (ms|s): {folder}; figures and a page: hpcfl report '{folder}'", lines[-1]), lines[-1]
    assert lines[0].startswith("tiny: standalone on digits, 5 clients on 1 rank(s) of 1 thread, 3 rounds -> ")


@pytest.mark.parametrize(("clients", "alone"), [(2, "fedavg averages nothing here"), (3, "these have one client only, which averages with nobody: cnn1"),
                                                (4, "")])
def test_clients_that_average_with_nobody_are_named_before_and_in_the_run(clients, alone, hpcfl, tmp_path):
    job = tiny("fedavg", federation={"clients": clients, "participation": 1.0, "rounds": 1})
    code, text = hpcfl("run", write_job(tmp_path, job), "--dry-run")
    assert code == 0 and [alone in line for line in text.splitlines() if line.startswith("# warning: ")] == [True] * bool(alone)
    folder = carry_out(job, tmp_path / "run")
    assert [alone in line for line in (folder / "log" / "rank-0000.log").read_text().splitlines() if " WARNING fedavg averages" in line] == [True] * bool(alone)
    assert [alone in warning for warning in summary.summarise(folder)["warnings"]] == [True] * bool(alone)
