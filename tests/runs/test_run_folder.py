"""Which folder a run works in, who holds it, and what its STATUS says; no run takes the folder of another, finished or at work."""
import json
import multiprocessing
import os
import platform
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from hpcfl.errors import CheckpointError, JobError
from hpcfl.runs.run_folder import choose_folders, is_finished, is_of, owning, write_status
from hpcfl.wire.communicator import Alone, Communicator
from tests.support.faults import PAUSES, files
from tests.support.fork_server import Forked
from tests.support.tiny_runs import apart, carry_out, outcome, started, tiny, write_job

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


def test_a_run_that_died_in_its_first_checkpoint_begins_again(finished, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "metrics.h5", tmp_path / "run")
    (tmp_path / "run" / "STATUS").write_text("failed: the disk was full\n")
    with pytest.raises(JobError, match="nothing is overwritten"):
        carry_out(JOB, tmp_path / "run", resume="never")
    carry_out(JOB, tmp_path / "run")
    assert outcome(tmp_path / "run").manifest["rows"] == 2


def test_what_goes_on_from_a_checkpoint_does_not_enter_the_folder_of_another_run(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    before = (other / "metrics.h5").read_bytes()
    with pytest.raises(JobError, match="other: holds a run already and nothing is overwritten"):
        carry_out(JOB, other, resume=finished)
    assert (other / "metrics.h5").read_bytes() == before


def test_a_finished_run_of_another_job_is_no_run_of_this_job(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(CheckpointError, match="differs in training.lr; nothing was changed"):
        carry_out(tiny("standalone", training={"lr": 0.01}, federation={"rounds": 2}, checkpoint={"every": 1}), folder)
    assert (folder / "STATUS").read_text() == "done\n"


def started_at(process: int) -> str:
    """When a process began, as LOCK has it."""
    return datetime.fromtimestamp(psutil.Process(process).create_time(), UTC).isoformat(timespec="seconds")


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_second_job_on_a_run_folder_is_refused_and_told_of_the_first(ranks, whole, tmp_path):
    folder = tmp_path / "run"
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=ranks, fault=PAUSES) as first:
        first.reaches("paused-0")
        before, holder = files(folder), first.rank(0).pid
        with started(tmp_path / "second", "run", whole[1], "--out", folder, ranks=ranks) as second:
            assert second.ends() == 2, second.text()
        text = " ".join(second.text().split())
        who = f"process {holder} on {platform.node()}, since {started_at(holder)}"
        assert text.count(f"{folder}: another run is at work in this folder ({who}); wait for it, or choose another --out") == 1
        assert files(folder) == before and first.process.poll() is None
        (tmp_path / "go").touch()
        assert first.ends() == 0, first.text()
    assert not apart(outcome(folder), outcome(whole[2]))


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up(whole, hpcfl, tmp_path):
    folder = tmp_path / "run"
    run = Forked(tmp_path, "run", whole[1], "--out", folder, fault=PAUSES)
    while not (tmp_path / "paused-0").exists():
        assert run.process.is_alive(), run.text()
        time.sleep(0.02)
    run.process.kill()
    run.ends()
    held = json.loads((folder / "LOCK").read_text())
    assert (held["host"], held["pid"]) == (platform.node(), run.process.pid) and abs(datetime.fromisoformat(held["started"]).timestamp() - time.time()) < 60
    code, text = hpcfl("run", whole[1], "--out", folder)
    assert code == 0 and "resumed after round 2 of 4" in text and not apart(outcome(folder), outcome(whole[2]))
    assert json.loads((folder / "LOCK").read_text()) == {"host": platform.node(), "pid": os.getpid(), "started": started_at(os.getpid())}


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_trained(hpcfl, tmp_path):
    path = write_job(tmp_path, tiny("standalone"))
    (tmp_path / "file").write_text("in the way")
    code, text = hpcfl("run", path, "--out", tmp_path / "file" / "run")
    assert code == 2 and f"{tmp_path / 'file' / 'run'}: cannot write there: Not a directory; choose a writable folder with --out" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_is_said(hpcfl, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    code, text = hpcfl("run", write_job(tmp_path, tiny("standalone")), "--out", tmp_path / "closed" / "run")
    assert code == 2 and f"{tmp_path / 'closed' / 'run'}: cannot write there: Permission denied" in text
