"""Recordings: what a metrics.h5 says, and records that are cut, damaged or of another schema."""

import h5py
import numpy as np
import pytest

from hpcfl.errors import CheckpointError
from hpcfl.report import summary
from tests.support.recorded_runs import altered, compressing, record


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
