"""Which folder a run works in, who holds it, and what its STATUS says."""
import multiprocessing
from pathlib import Path

import pytest

from hpcfl.errors import JobError
from hpcfl.runs.run_folder import choose_folders, is_finished, is_of, owning, write_status
from hpcfl.wire.communicator import Alone, Communicator
from tests.support.tiny_runs import carry_out, tiny

JOB = tiny("standalone", federation={"rounds": 2}, checkpoint={"every": 1})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of JOB that came to its end."""
    return carry_out(JOB, tmp_path_factory.mktemp("folders") / "run")


def test_without_a_word_of_the_user_a_new_folder_is_named_by_time_and_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, source = choose_folders(JOB, None, "auto")
    assert Path(folder).parent == Path("runs/tiny") and folder.endswith(f"Z-{JOB.digest()}") and source is None


def test_a_folder_with_a_checkpoint_is_gone_on_with_and_never_taken_for_a_new_run(finished):
    assert choose_folders(JOB, finished, "auto") == (str(finished), str(finished))
    with pytest.raises(JobError, match="nothing is overwritten; choose another --out, or --resume auto"):
        choose_folders(JOB, finished, "never")


def test_what_goes_on_elsewhere_leaves_other_runs_alone(finished, tmp_path):
    assert choose_folders(JOB, tmp_path / "new", str(finished)) == (str(tmp_path / "new"), str(finished))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics.h5").touch()
    with pytest.raises(JobError, match="holds a run already"):
        choose_folders(JOB, tmp_path / "taken", str(finished))


def test_nothing_is_resumed_from_where_there_is_no_checkpoint(tmp_path):
    with pytest.raises(JobError, match="no checkpoint there; wanted a run folder with LATEST"):
        choose_folders(JOB, None, str(tmp_path))


def test_a_finished_run_is_known_with_its_job(finished, tmp_path):
    assert is_finished(finished) and is_of(finished, JOB) and not is_of(finished, tiny("fedavg"))
    assert not is_finished(tmp_path)


def hold(folder: Path, held, let_go) -> None:
    """Another process that holds the folder until it is told to let go."""
    with owning(folder, Communicator(Alone())):
        held.set()
        let_go.wait(60)


def test_a_second_run_in_a_folder_is_refused_by_the_name_of_the_first(tmp_path):
    context = multiprocessing.get_context("fork")
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", held, let_go))
    other.start()
    assert held.wait(60)
    with pytest.raises(JobError, match=f"another run is at work in this folder .process {other.pid} on "), owning(tmp_path / "run", Communicator(Alone())):
        pass
    let_go.set()
    other.join(60)
    with owning(tmp_path / "run", Communicator(Alone())):
        pass


def test_a_status_is_one_line(tmp_path):
    write_status(tmp_path, "failed: rank 1:\n  no images")
    assert (tmp_path / "STATUS").read_text() == "failed: rank 1: no images\n"
