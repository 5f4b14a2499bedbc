"""Summaries: the figures of a run worked out by hand."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcfl.report import page, summary
from tests.support.recorded_runs import TEXT, altered, compressing, record, three_ways, told


def test_accuracy_is_the_last_evaluation_in_percent(tmp_path):
    accuracy = summary.summarise(record(tmp_path / "run"))["accuracy"]
    generalization = accuracy["generalization"]
    assert generalization["per_client"] == [50.0, 50.0] and generalization["mean"] == 50.0 and generalization["sd"] == 0.0
    assert accuracy["before_finetune"]["per_client"] == [30.0, 30.0]
    assert accuracy["recall"] == [50.0, 40.0, 55.0] and accuracy["recall_before_finetune"] == [30.0, 30.0, 30.0]
    assert accuracy["rounds"] == 2


def test_models_of_the_federation_have_an_accuracy_beside_the_clients(undrawn, tmp_path):
    def add(file):
        file.create_dataset("evaluation/global_names", data=np.array(["cnn1", "mlp2", "old"], object), dtype=TEXT)
        file["evaluation/global_correct"] = [[[-1] * 3] * 3, [[1, 1, 2]] * 3, [[-1] * 3] * 3, [[10, 10, 0], [10, 0, 20], [-1] * 3]]
    folder = altered(tmp_path / "run", add)
    assert summary.summarise(folder)["accuracy"]["global"] == {"mean": 62.5, "min": 50.0, "max": 75.0, "per_model": {"cnn1": 50.0, "mlp2": 75.0}}
    assert "global" not in summary.summarise(record(tmp_path / "without"))["accuracy"]
    heading, line = told([folder]).splitlines()[:2]
    assert heading.index("global model") < heading.index("clients") and line.index("62.5 (50.0 to 75.0)") < line.index("50.0 (50.0 to 50.0)")
    text = page.write([folder], tmp_path / "out").read_text()
    assert "<dt>Global model</dt><dd>62.5 %" in text and "<b>62.5</b><small>50.0 – 75.0</small>" in text and "<td>50.0<small>50.0 – 50.0</small>" in text
    assert summary.summarise(folder)["accuracy"]["report"]["measure"] == "global"
    assert summary.summarise(record(tmp_path / "clients"))["accuracy"]["report"]["measure"] == "generalization"


def test_bytes_until_an_accuracy_are_those_of_the_federations_models_where_there_are_any(undrawn, tmp_path):
    def add(file):
        file.create_dataset("evaluation/global_names", data=np.array(["cnn1"], object), dtype=TEXT)
        file["evaluation/global_correct"] = [[[-1] * 3], [[10, 10, 10]], [[-1] * 3], [[10, 10, 20]]]
    found = summary.summarise(altered(tmp_path / "run", add), targets=[50, 75])["bytes"]
    assert found["until_accuracy_of"] == "global"
    assert [found["until_accuracy"][target]["rounds"] for target in ("50", "75")] == [1, 1]
    assert found["until_client_accuracy"]["50"]["rounds"] == 2 and found["until_client_accuracy"]["75"] is None
    assert "First evaluation at which the mean of the federation's own models reached it" in page.write([tmp_path / "run"], tmp_path / "out").read_text()


def test_client_without_test_samples_is_left_out_of_personal_accuracy(tmp_path):
    personal = summary.summarise(record(tmp_path / "run"))["accuracy"]["personal"]
    assert personal == {"mean": 50.0, "min": 50.0, "max": 50.0, "sd": 0.0, "per_client": [50.0, None]}


def test_absent_classes_are_those_without_training_samples(tmp_path):
    absent = summary.summarise(record(tmp_path / "run"))["accuracy"]["absent_classes"]
    assert absent["per_client"] == [20.0, 10.0] and absent["mean"] == 15.0
    assert absent["before_finetune"]["per_client"] == [0.0, 0.0]


def test_client_that_has_every_class_has_no_absent_accuracy(tmp_path):
    def fill(file):
        file["partition/train"][0] = [1, 1, 1]
    assert summary.summarise(altered(tmp_path / "run", fill))["accuracy"]["absent_classes"]["per_client"] == [None, 10.0]


def test_bytes_are_summed_over_clients_ranks_and_rounds(tmp_path):
    found = summary.summarise(record(tmp_path / "run"), targets=[25, 50, 50.1])["bytes"]
    assert (found["simulated_up_bytes"], found["simulated_down_bytes"], found["transported_bytes"]) == (250, 40, 20)
    assert found["per_round"]["simulated_up_bytes"] == [100, 150] and found["per_client"]["simulated_up_bytes"] == [200, 50]
    assert found["until_accuracy"] == {"25": {"rounds": 1, "simulated_bytes": 120, "transported_bytes": 10},
                                       "50": {"rounds": 2, "simulated_bytes": 290, "transported_bytes": 20}, "50.1": None}


def test_seconds_of_a_phase_are_those_of_its_slowest_rank(tmp_path):
    found = summary.summarise(record(tmp_path / "run"))
    assert found["seconds"] == {"train": 5.0, "combine": 4.0} and found["wall_s"] == 10.0
    assert found["seconds_by_rank"] == {"train": [3.0, 4.0], "combine": [3.0, 2.0], "idle": [2.0, 1.0]}
    assert found["idle_share"] == pytest.approx(3.0 / 20.0)


def test_architectures_are_means_over_their_clients_and_rounds(tmp_path):
    mlp, cnn = summary.summarise(altered(tmp_path / "run", compressing(3)))["by_architecture"]
    assert cnn == {"architecture": "cnn1", "clients": 1, "parameters": 1000, "memory_bytes": 4_000_000, "forward_flops": None,
                   "train_s": 3.0, "refine_s": None, "simulated_up_bytes": 100.0, "simulated_down_bytes": 10.0, "generalization": 50.0, "personal": 50.0}
    assert (mlp["architecture"], mlp["train_s"], mlp["simulated_up_bytes"], mlp["personal"]) == ("mlp<b>", 1.0, 25.0, None)


def test_clients_of_one_architecture_are_one_row(tmp_path):
    def same(file):
        del file["clients/architecture"]
        file.create_dataset("clients/architecture", data=np.array(["cnn1", "cnn1"], object), dtype=TEXT)
    row, = summary.summarise(altered(tmp_path / "run", same))["by_architecture"]
    assert (row["clients"], row["simulated_up_bytes"], row["memory_bytes"], row["train_s"]) == (2, 62.5, None, None)


def test_architectures_that_move_between_clients_are_not_summed_by_client(tmp_path):
    def move(file):
        file.attrs["job"] += '[models]\nsize_schedule = "rotate"\n'
    assert summary.summarise(altered(tmp_path / "run", move))["by_architecture"] == []


def test_an_architecture_counts_once_however_many_clients_have_it(tmp_path):
    over = summary.summarise(three_ways(tmp_path / "run"))["accuracy"]["over_architectures"]
    assert over["final"] == (20 + 30) / 2 and over["per_architecture"]["a"]["final"] == 20


def test_validation_selects_for_clients_together_and_the_earliest_of_equals(tmp_path):
    over = summary.summarise(three_ways(tmp_path / "run"))["accuracy"]["over_architectures"]
    a, b = (over["per_architecture"][name] for name in "ab")
    assert (a["selected"], a["selected_rounds"]) == (40, 2), "round 3 validates as well and is better on the test set, at which nothing may look"
    assert (b["selected"], b["selected_rounds"]) == (50, 3) and over["selected"] == 45


def test_best_on_test_is_the_maximum_of_each_architecture_at_the_end_of_a_round(tmp_path):
    over = summary.summarise(three_ways(tmp_path / "run"))["accuracy"]["over_architectures"]
    assert [over["per_architecture"][name]["best_on_test"] for name in "ab"] == [45, 60] and over["best_on_test"] == 52.5


@pytest.mark.parametrize("validation, known", [((0, 0, 0), [None, None]), ((10, 30, 0), [40, None])])
def test_without_validation_parts_nothing_is_selected(tmp_path, validation, known):
    over = summary.summarise(three_ways(tmp_path / "run", validation))["accuracy"]["over_architectures"]
    assert [over["per_architecture"][name]["selected"] for name in "ab"] == known
    assert (over["final"], over["selected"], over["best_on_test"]) == (25, None, 52.5)


def test_architectures_that_move_between_clients_have_no_accuracy_or_operations_of_their_own(tmp_path):
    def move(file):
        file.attrs["job"] += '[models]\nsize_schedule = "random"\n'
        file["train/flops"] = [[1.0] * 3] * 4
    found = summary.summarise(three_ways(tmp_path / "run", change=move))
    assert found["accuracy"]["over_architectures"] is None and found["flops"] == {}


def test_run_that_was_never_evaluated_has_no_accuracy_over_architectures(undrawn, tmp_path):
    def forget(file):
        del file["evaluation"]
    folder = three_ways(tmp_path / "run", change=forget)
    assert summary.summarise(folder)["accuracy"]["over_architectures"] is None
    assert "three ways" not in page.write([folder], tmp_path / "out").read_text()


def test_operations_are_means_over_the_clients_of_an_architecture_in_each_phase(undrawn, tmp_path):
    def count(file):
        nothing = [np.nan] * 3
        file["train/flops"], file["train/refine_flops"] = [[1e6, 3e6, np.nan], nothing, nothing, nothing], [nothing, nothing, nothing, [5.0, np.nan, 7.0]]
    folder = three_ways(tmp_path / "run", change=count)
    found = summary.summarise(folder)
    assert found["flops"] == {"warm-up": {"a": {"training_flops_per_round": 2e6, "refining_flops_per_round": None},
                                          "b": {"training_flops_per_round": None, "refining_flops_per_round": None}},
                              "train": {"a": {"training_flops_per_round": None, "refining_flops_per_round": 5.0},
                                        "b": {"training_flops_per_round": None, "refining_flops_per_round": 7.0}}}
    assert [entry["forward_flops"] for entry in found["by_architecture"]] == [1500, 10]
    text = page.write([folder], tmp_path / "out").read_text()
    assert "<td class=word>a</td><td>2.00 MFLOP</td><td>–</td>" in text and "<td>1.50 kFLOP</td>" in text
    assert "Training per round" not in text, "the operations of one round are no curve"
    assert summary.summarise(three_ways(tmp_path / "uncounted"))["flops"] == {}


def test_server_has_its_last_values_without_negative_shares(tmp_path):
    found = summary.summarise(altered(tmp_path / "run", compressing(3)))["server"]
    assert found == {"aggregation_accuracy": 60.0, "compression_accuracy cnn1@0.5": 20.0}
    assert summary.summarise(record(tmp_path / "without"))["server"] == {}


def test_summary_goes_into_strict_json(tmp_path):
    found = summary.summarise(record(tmp_path / "run"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["algorithm"], found["name"], found["seed"], found["rounds"], found["ranks"], found["clients"], found["status"]) == \
        ("fedvtc", "toy", 0, 2, 2, 2, "done")


def test_run_without_rounds_or_evaluations_has_a_summary(tmp_path):
    def empty(file):
        for name in ("rounds/phase", "rounds/round", "rounds/wall_s", "train/loss", "seconds/train"):
            kept = file[name][:0]
            del file[name]
            file.create_dataset(name, data=kept, dtype=TEXT if name == "rounds/phase" else None)
        del file["evaluation"]
    found = summary.summarise(altered(tmp_path / "run", empty))
    assert found["rounds"] == 0 and found["accuracy"]["generalization"]["mean"] is None
    assert found["accuracy"]["generalization"]["per_client"] == [None, None]
    assert "before_finetune" not in found["accuracy"]


def test_drawing_library_is_not_loaded_before_it_is_needed():
    code = "import sys, hpcfl.report.summary, hpcfl.report.hdf5_view; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
