"""A run takes no folder that belongs to another run, finished or at work, and goes on in its own."""
import json
import os
import platform
import shutil
import time
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest

from hpcfl.errors import CheckpointError, JobError
from tests.support.faults import PAUSES, files
from tests.support.fork_server import Forked
from tests.support.tiny_runs import apart, carry_out, outcome, started, tiny, write_job


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return carry_out(tiny("standalone"), tmp_path_factory.mktemp("finished") / "run")


def test_a_run_that_died_in_its_first_checkpoint_begins_again(finished, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "metrics.h5", tmp_path / "run")
    (tmp_path / "run" / "STATUS").write_text("failed: the disk was full\n")
    with pytest.raises(JobError, match="nothing is overwritten"):
        carry_out(tiny("standalone"), tmp_path / "run", resume="never")
    carry_out(tiny("standalone"), tmp_path / "run")
    assert outcome(tmp_path / "run").manifest["rows"] == 3


def test_what_goes_on_from_a_checkpoint_does_not_enter_the_folder_of_another_run(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    before = (other / "metrics.h5").read_bytes()
    with pytest.raises(JobError, match="other: holds a run already and nothing is overwritten"):
        carry_out(tiny("standalone"), other, resume=finished)
    assert (other / "metrics.h5").read_bytes() == before


def test_a_finished_run_of_another_job_is_no_run_of_this_job(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(CheckpointError, match="differs in training.lr; nothing was changed"):
        carry_out(tiny("standalone", training={"lr": 0.01}), folder)
    assert (folder / "STATUS").read_text() == "done\n"


def started_at(process: int) -> str:
    """When a process began, as LOCK has it."""
    return datetime.fromtimestamp(psutil.Process(process).create_time(), timezone.utc).isoformat(timespec="seconds")


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_second_job_on_a_run_folder_is_refused_and_told_of_the_first(ranks, whole, tmp_path):
    folder = tmp_path / "run"
    with started(tmp_path, "run", whole[1], "--out", folder, ranks=ranks, fault=PAUSES) as first:
        first.reaches("paused-0")
        before, holder = files(folder), first.rank(0).pid
        with started(tmp_path / "second", "run", whole[1], "--out", folder, ranks=ranks) as second:
            assert second.ends() == 2, second.text()
        text = " ".join(second.text().split())
        assert text.count(f"{folder}: another run is at work in this folder (process {holder} on {platform.node()}, since {started_at(holder)}); wait for it, or choose another --out") == 1
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
