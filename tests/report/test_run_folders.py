"""Run folders: which places hold runs, what others are, and whether a run that says it is running still is."""
import fcntl
import json
import os
import platform
import time

import pytest

from hpcfl.errors import JobError
from hpcfl.files import lock
from hpcfl.report import run_folders, summary
from tests.support.recorded_runs import record, told


def test_folder_that_is_no_run_is_named_with_a_way_out(tmp_path):
    with pytest.raises(JobError, match="no such folder"):
        summary.summarise(tmp_path / "nowhere")
    record(tmp_path / "name" / "2025-run")
    with pytest.raises(JobError, match="2025-run"):
        summary.summarise(tmp_path / "name")
    (tmp_path / "STATUS").write_text("failed: no such data set")
    with pytest.raises(JobError, match="no such data set"):
        summary.summarise(tmp_path)


def test_folders_of_runs_are_taken_apart_and_what_is_none_is_skipped_with_a_reason(tmp_path):
    runs = [record(tmp_path / "runs" / "sweep" / name) for name in "ab"] + [record(tmp_path / "runs" / "one")]
    (tmp_path / "runs" / "sweep" / "report").mkdir()
    (tmp_path / "runs" / "sweep" / "died").mkdir()
    (tmp_path / "runs" / "sweep" / "died" / "STATUS").write_text("failed: no such data set")
    (tmp_path / "notes.txt").write_text("mine")
    found, skipped = run_folders.find_runs([tmp_path / "runs" / "sweep", tmp_path / "runs", tmp_path / "notes.txt", runs[0], tmp_path / "nowhere"])
    assert found == runs, "each once, in the order in which they were named"
    others = [tmp_path / "runs" / "sweep" / "died", tmp_path / "notes.txt", tmp_path / "nowhere"]
    assert [line.partition(": ")[0] for line in skipped] == list(map(str, others))
    assert "no such data set" in skipped[0] and "is a file" in skipped[-2] and "no such folder" in skipped[-1]
    with pytest.raises(JobError, match="has no metrics.h5"):
        run_folders.find_runs([tmp_path / "runs" / "sweep" / "report"])


@pytest.mark.parametrize("held", [True, False])
def test_a_run_is_alive_only_while_its_process_holds_the_lock(tmp_path, held):
    folder = record(tmp_path / "run", status="running\n")
    with (folder / "LOCK").open("w") as handle:
        handle.write(json.dumps(lock.describe_holder()))
        handle.flush()
        if held:
            fcntl.flock(handle, fcntl.LOCK_EX)
        status = summary.summarise(folder)["status"]
        assert status == "running" if held else status.startswith(f"died: process {os.getpid()} on {platform.node()} ended without a word")
    if not held:
        assert " died " in told([folder]).splitlines()[1] and "ended without a word" in told([folder])


def test_a_run_of_another_host_is_said_to_be_beyond_checking(tmp_path):
    folder = record(tmp_path / "run", status="running\n")
    (folder / "LOCK").write_text('{"host": "far-away", "pid": 7, "started": "2026-01-01T00:00:00+00:00"}\n')
    os.utime(folder / "metrics.h5", (0, time.time() - 7200))
    os.utime(folder / "STATUS", (0, 0))
    assert summary.summarise(folder)["status"] == "running?: on far-away, which cannot be checked from here; last sign of it 2 h ago"
    (folder / "LOCK").unlink()
    assert "nobody says where" in summary.summarise(folder)["status"]
