"""Recordings: what a metrics.h5 says, whether its run is alive, and records that are cut, damaged or of another schema."""
import fcntl
import json
import os
import platform
import time

import h5py
import numpy as np
import pytest

from hpcfl.errors import CheckpointError, JobError
from hpcfl.files import lock
from hpcfl.report import recording, summary
from tests.support.recorded_runs import altered, compressing, record, told


@pytest.mark.parametrize("plan", ["{", '{"phase": 1}', '[{"phase": "train"}]', "[3]"])
def test_a_damaged_plan_is_refused(tmp_path, plan):
    with pytest.raises(CheckpointError, match="attribute missing or damaged"):
        summary.summarise(altered(tmp_path / "run", lambda file: file.attrs.update(plan=plan)))


def test_an_evaluation_before_refining_goes_with_the_end_of_the_same_round_only(tmp_path):
    def later(file):
        file["evaluation/stage"][2] = "end"                        # the last round's phase refines nothing
    accuracy = summary.summarise(altered(tmp_path / "run", later))["accuracy"]
    assert accuracy["refine"] is None and not any(key.startswith("before_") for key in accuracy)
    assert "local training" in accuracy["described"]["generalization"]


def test_a_record_without_a_plan_calls_only_fedvtcs_last_work_fine_tuning(tmp_path):
    def other(file):
        file.attrs["algorithm"] = "fedavg"
    assert summary.summarise(record(tmp_path / "old"))["accuracy"]["refine"] == "finetune"
    assert summary.summarise(altered(tmp_path / "other", other))["accuracy"]["refine"] == "refine"


def test_negative_shares_are_sorted_by_layer_and_from_wide_to_narrow(tmp_path):
    paths, sizes, values = summary.read(altered(tmp_path / "run", compressing(11))).negatives()
    assert paths == [f"body.{layer}.weight" for layer in range(1, 12)] and sizes == ["1", "cnn1@0.75", "cnn1@0.5"]
    assert values.shape == (2, 11, 3) and np.isnan(values[0]).all() and values[1, 9].tolist() == [60.0, 50.0, 40.0]


def test_rows_past_the_last_complete_round_are_ignored(tmp_path):
    def cut(file):
        kept = file["bytes/transported"][:1]
        del file["bytes/transported"]
        file["bytes/transported"] = kept
    found = summary.summarise(altered(tmp_path / "run", cut))
    assert found["rounds"] == 1 and found["accuracy"]["rounds"] == 1 and found["accuracy"]["generalization"]["per_client"] == [25.0, 25.0]
    assert found["bytes"]["simulated_up_bytes"] == 100


def test_folder_that_is_no_run_is_named_with_a_way_out(tmp_path):
    with pytest.raises(JobError, match="no such folder"):
        summary.summarise(tmp_path / "nowhere")
    record(tmp_path / "name" / "2025-run")
    with pytest.raises(JobError, match="2025-run"):
        summary.summarise(tmp_path / "name")
    (tmp_path / "STATUS").write_text("failed: no such data set")
    with pytest.raises(JobError, match="no such data set"):
        summary.summarise(tmp_path)


def test_truncated_record_is_refused_by_name(tmp_path):
    path = record(tmp_path / "run") / "metrics.h5"
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match="metrics.h5.*truncated"):
        summary.summarise(tmp_path / "run")


def test_record_that_leads_into_another_file_is_refused(tmp_path):
    record(tmp_path / "other")

    def lead(file):
        del file["train/loss"]
        file["train/loss"] = h5py.ExternalLink(str(tmp_path / "other" / "metrics.h5"), "/train/loss")
    with pytest.raises(CheckpointError, match="train/loss.*external link"):
        summary.summarise(altered(tmp_path / "run", lead))


def test_record_of_other_shape_or_schema_is_refused(tmp_path):
    def widen(file):
        del file["partition/train"]
        file["partition/train"] = np.ones((2, 4), int)
    with pytest.raises(CheckpointError, match=r"partition/train.*\(2, 4\), wanted \(2, 3\)"):
        summary.summarise(altered(tmp_path / "wide", widen))
    with pytest.raises(CheckpointError, match="schema = 2, wanted 1"):
        summary.summarise(altered(tmp_path / "new", lambda file: file.attrs.update(schema=2)))


def test_folders_of_runs_are_taken_apart_and_what_is_none_is_skipped_with_a_reason(tmp_path):
    runs = [record(tmp_path / "runs" / "sweep" / name) for name in "ab"] + [record(tmp_path / "runs" / "one")]
    (tmp_path / "runs" / "sweep" / "report").mkdir()
    (tmp_path / "runs" / "sweep" / "died").mkdir()
    (tmp_path / "runs" / "sweep" / "died" / "STATUS").write_text("failed: no such data set")
    (tmp_path / "notes.txt").write_text("mine")
    found, skipped = recording.find_runs([tmp_path / "runs" / "sweep", tmp_path / "runs", tmp_path / "notes.txt", runs[0], tmp_path / "nowhere"])
    assert found == runs, "each once, in the order in which they were named"
    others = [tmp_path / "runs" / "sweep" / "died", tmp_path / "notes.txt", tmp_path / "nowhere"]
    assert [line.partition(": ")[0] for line in skipped] == list(map(str, others))
    assert "no such data set" in skipped[0] and "is a file" in skipped[-2] and "no such folder" in skipped[-1]
    with pytest.raises(JobError, match="has no metrics.h5"):
        recording.find_runs([tmp_path / "runs" / "sweep" / "report"])


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
