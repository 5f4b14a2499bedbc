"""Reports: figures of a run worked out by hand, runs that are unfinished or damaged, and a page that needs nothing but itself."""
import csv
import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcfl import cli
from hpcfl.errors import CheckpointError, JobError
from hpcfl.files import lock
from hpcfl.report import canvas, figures, labels, page, recording, summary, tables

TEXT = h5py.string_dtype()
JOB = """[run]
name = "{name}"
seed = {seed}

[data]
name = "digits"

[algorithm]
name = "fedvtc"
lr = {lr}
"""


def record(folder: Path, name: str = "toy", seed: int = 0, lr: float = 0.1, status: str = "done", right: int = 0) -> Path:
    """A run of 2 clients, 3 classes, 2 rounds on 2 ranks; client 0 has no sample of class 2, client 1 none of 0 and 1; `right` adds correct ones."""
    folder.mkdir(parents=True)
    (folder / "STATUS").write_text(status)
    with h5py.File(folder / "metrics.h5", "w") as file:
        file.attrs.update(schema=1, algorithm="fedvtc", job=JOB.format(name=name, seed=seed, lr=lr), clients=2, classes=3, ranks=2)
        file.create_dataset("rounds/phase", data=np.array(["train", "train"], object), dtype=TEXT)
        file["rounds/round"], file["rounds/wall_s"] = [0, 1], [4.0, 6.0]
        file["train/loss"] = [[2.0, np.nan], [1.0, 1.5]]
        file["train/kl"] = [[0.5, np.nan], [0.25, 0.3]]
        file["bytes/simulated_up"], file["bytes/simulated_down"] = [[100, 0], [100, 50]], [[10, 10], [10, 10]]
        file["bytes/transported"] = [[7, 3], [7, 3]]
        file["seconds/train"], file["seconds/combine"] = [[1.0, 3.0], [2.0, 1.0]], [[2.5, 0.5], [0.5, 1.5]]
        file["seconds/idle"] = [[2.0, 0.0], [0.0, 1.0]]
        file["evaluation/at"] = [0, 0, 1, 1]
        file.create_dataset("evaluation/stage", data=np.array(["before_refine", "end"] * 2, object), dtype=TEXT)
        file["evaluation/generalization_count"] = [10, 10, 20]
        file["evaluation/generalization_correct"] = np.array([[[1, 1, 2], [1, 1, 2]], [[5, 5, 0], [0, 0, 10]],
                                                              [[6, 6, 0], [0, 0, 12]], [[8, 8, 4], [2, 0, 18]]]) + right
        file["evaluation/personal_count"] = [[2, 2, 0], [0, 0, 0]]
        file["evaluation/personal_correct"] = [[[1, 1, 0], [0, 0, 0]]] * 4
        file["partition/train"] = [[30, 10, 0], [0, 0, 40]]
        file.create_dataset("clients/architecture", data=np.array(["cnn1", "mlp<b>"], object), dtype=TEXT)
        file["clients/rank"], file["clients/parameters"] = [0, 1], [1000, 2000]
        file["samples/synthetic"], file["samples/real"] = np.full((1, 3, 2, 1, 4, 4), 90, np.uint8), np.full((3, 2, 1, 4, 4), 200, np.uint8)
        file["samples/has"], file["samples/client"] = [[True, True, False]], [0]
    return folder


def altered(folder: Path, change) -> Path:
    """A recorded run whose file `change` was allowed to alter."""
    with h5py.File(record(folder) / "metrics.h5", "r+") as file:
        change(file)
    return folder


def compressing(layers: int):
    """What a server that compresses adds to a record: shares of negative weights of so many layers, accuracies, seconds and memory of its clients."""
    def change(file):
        for layer in range(1, layers + 1):
            for size, share in (("1", 50.0), ("cnn1@0.5", 30.0), ("cnn1@0.75", 40.0)):
                file[f"server/negative body.{layer}.weight {size}"] = [np.nan, share + layer]
        file["server/aggregation_accuracy"], file["server/compression_accuracy cnn1@0.5"] = [60.0, np.nan], [10.0, 20.0]
        file["train/aggregate_dilation_accuracy"] = [[np.nan, 30.0], [np.nan, 35.0]]
        file["train/seconds"], file["clients/memory_bytes"] = [[2.0, np.nan], [4.0, 1.0]], [4_000_000, 7]
    return change


def three_ways(folder: Path, validation: tuple[int, int, int] = (10, 30, 20), seed: int = 0, better: int = 0, change=lambda file: None) -> Path:
    """A run of 3 clients, two of architecture a and one of b, 100 test images, 4 rounds in 2 phases; `better` adds right answers at the last evaluation.

    Taken together a's clients validate best after rounds 2 and 3, alike; as a mean over clients after round 1, where client 0 does well on few images.
    """
    folder.mkdir(parents=True)
    with h5py.File(folder / "metrics.h5", "w") as file:
        file.attrs.update(schema=1, algorithm="fedavg", job=JOB.format(name="toy", seed=seed, lr=0.1), clients=3, classes=1, ranks=1)
        file.create_dataset("rounds/phase", data=np.array(["warm-up", "warm-up", "warm-up", "train"], object), dtype=TEXT)
        file.create_dataset("clients/architecture", data=np.array(["a", "a", "b"], object), dtype=TEXT)
        file["clients/forward_flops"], file["clients/parameters"] = [1500, 1500, 10], [3, 3, 2]
        file["evaluation/at"] = [0, 0, 1, 2, 3]
        file.create_dataset("evaluation/stage", data=np.array(["before_refine", *["end"] * 4], object), dtype=TEXT)
        file["evaluation/generalization_count"] = [100]
        right = np.array([[99, 99, 99], [10, 20, 40], [30, 50, 60], [50, 40, 50], [20, 20, 30]])
        right[-1] += better
        file["evaluation/generalization_correct"] = right[:, :, None]
        file["evaluation/validation_count"] = np.array(validation)[:, None]
        validated = np.array([[10, 30, 20], [9, 3, 5], [1, 15, 10], [2, 14, 12], [0, 0, 12]])
        file["evaluation/validation_correct"] = np.minimum(validated, validation)[:, :, None]
        change(file)
    return folder


def planned(**refines: str | None):
    """What a record says of its plan: phases by what they do last; parts that are averaged come from nowhere."""
    plan = [{"phase": phase, "rounds": 1, "refines": word, "averages": {}} for phase, word in refines.items()]
    return lambda file: file.attrs.update(plan=json.dumps(plan))


def told(folders: list[Path], how: str = "text") -> str:
    """What the terminal shows of runs."""
    groups = labels.label_groups([recording.read(folder) for folder in folders])
    return tables.FORMATS[how]({label: [summary.summarise(each) for each in group] for label, group in groups.items()})


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """The folder of a report of three runs, two of which differ only in seed."""
    base = tmp_path_factory.mktemp("report")
    runs = [record(base / "a", seed=0), record(base / "b", seed=1, right=1), record(base / "c", name="<i>$x", lr=0.2, status="running")]
    page.write(runs, base / "out")
    return base / "out"


def test_accuracy_is_the_last_evaluation_in_percent(tmp_path):
    accuracy = summary.summarise(record(tmp_path / "run"))["accuracy"]
    generalization = accuracy["generalization"]
    assert generalization["per_client"] == [50.0, 50.0] and generalization["mean"] == 50.0 and generalization["sd"] == 0.0
    assert accuracy["before_finetune"]["per_client"] == [30.0, 30.0]
    assert accuracy["recall"] == [50.0, 40.0, 55.0] and accuracy["recall_before_finetune"] == [30.0, 30.0, 30.0]
    assert accuracy["rounds"] == 2


def test_models_of_the_federation_have_an_accuracy_beside_the_clients(tmp_path):
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


def test_bytes_until_an_accuracy_are_those_of_the_federations_models_where_there_are_any(tmp_path):
    def add(file):
        file.create_dataset("evaluation/global_names", data=np.array(["cnn1"], object), dtype=TEXT)
        file["evaluation/global_correct"] = [[[-1] * 3], [[10, 10, 10]], [[-1] * 3], [[10, 10, 20]]]
    found = summary.summarise(altered(tmp_path / "run", add), targets=[50, 75])["bytes"]
    assert found["until_accuracy_of"] == "global"
    assert [found["until_accuracy"][target]["rounds"] for target in ("50", "75")] == [1, 1]
    assert found["until_client_accuracy"]["50"]["rounds"] == 2 and found["until_client_accuracy"]["75"] is None
    assert "First evaluation at which the mean of the federation's own models reached it" in page.write([tmp_path / "run"], tmp_path / "out").read_text()


@pytest.mark.parametrize(("word", "key", "said"), [("adopt", "before_adopt", "adopting the server's model"), ("finetune", "before_finetune", "fine-tuning"),
                                                   ("refine", "before_refine", "refining on what the server made")])
def test_models_before_the_last_work_are_called_after_what_that_work_is(tmp_path, word, key, said):
    folder = altered(tmp_path / "run", planned(train=word))
    accuracy = summary.summarise(folder)["accuracy"]
    assert accuracy["refine"] == word and accuracy[key]["per_client"] == [30.0, 30.0] and f"recall_{key}" in accuracy and key in accuracy["absent_classes"]
    assert sorted(name for name in accuracy if name.startswith("before_")) == [key]
    assert accuracy["described"][key] == f"clients' models as they trained them, before {said}, on the whole test set"
    assert accuracy["described"]["generalization"] == f"clients' models at the end of the round, after {said}, on the whole test set"
    assert accuracy["described"].keys() == {"generalization", "personal", "absent_classes", key}
    text, line = page.write([folder], tmp_path / "out").read_text(), told([folder]).splitlines()[1]
    assert f"Clients before and after {said}" in text.replace("&#x27;", "'") and said.split()[0] in line.split()
    assert (word == "finetune") == ("fine-tuning" in text + told([folder])), "only what fine-tunes is called so"


def test_a_run_that_is_not_finished_has_no_result_yet(tmp_path):
    def longer(file):
        file.attrs["plan"] = json.dumps([{"phase": "train", "rounds": 20, "refines": None, "averages": {}}])
    folder = altered(tmp_path / "run", longer)
    assert "only 2 of 20 rounds are finished" in summary.summarise(folder)["accuracy"]["report"]["why"]
    assert " 2/20 " in told([folder]).splitlines()[1] and "only 2 of 20 rounds are finished" in told([folder])


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


def test_load_balance_and_waiting_are_on_the_page(tmp_path):
    run = record(tmp_path / "run")
    found = summary.summarise(run)
    assert found["load_balance"] == (3.0 + 2.0) / (2.0 + 1.5) and found["idle_share"] == 3.0 / 20.0
    text = page.write([run], tmp_path).read_text()
    assert "waiting 15.0 %, busiest rank 1.43 of the mean" in text and "<summary>Ranks</summary>" in text and "Waiting (%)" in text


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


def test_run_that_was_never_evaluated_has_no_accuracy_over_architectures(tmp_path):
    def forget(file):
        del file["evaluation"]
    folder = three_ways(tmp_path / "run", change=forget)
    assert summary.summarise(folder)["accuracy"]["over_architectures"] is None
    assert "three ways" not in page.write([folder], tmp_path / "out").read_text()


def test_page_says_that_the_best_on_test_is_selected_by_test_data(tmp_path):
    text = page.write([three_ways(tmp_path / "run")], tmp_path / "out").read_text()
    assert "nothing selected it" in text and "<b>20.0" not in text
    rows = text[text.index("three ways</caption>"):]
    assert "Best on test, as published; selects by test data (%)" in rows[:rows.index("</thead>")]
    assert "<th scope=row class=word>a</th><td>20.0</td><td>40.0</td><td>45.0</td><td>2</td>" in rows
    assert "<th scope=row class=word>mean</th><td>25.0</td><td>45.0</td><td>52.5</td>" in rows


def test_three_ways_are_averaged_over_seeds(tmp_path):
    runs = [three_ways(tmp_path / str(seed), seed=seed, better=better) for seed, better in enumerate((0, 2, 4))]
    text = page.write(runs, tmp_path / "out").read_text()
    seeds = text[text.index("Over architectures: mean ± sample standard deviation over seeds</caption>"):text.index("<figure>")]
    assert "<td>27.0 ± 2.0</td><td>45.0 ± 0.0</td><td>52.5 ± 0.0</td>" in seeds
    assert "Best on test, as published; selects by test data (%)" in seeds


def test_operations_are_means_over_the_clients_of_an_architecture_in_each_phase(tmp_path):
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


def test_negative_shares_are_sorted_by_layer_and_from_wide_to_narrow(tmp_path):
    paths, sizes, values = summary.read(altered(tmp_path / "run", compressing(11))).negatives()
    assert paths == [f"body.{layer}.weight" for layer in range(1, 12)] and sizes == ["1", "cnn1@0.75", "cnn1@0.5"]
    assert values.shape == (2, 11, 3) and np.isnan(values[0]).all() and values[1, 9].tolist() == [60.0, 50.0, 40.0]


@pytest.mark.parametrize(("layers", "title"), [(3, "Share of negative weights"), (11, "Share of negative weights, round 2")])
def test_page_shows_what_the_server_measured(tmp_path, layers, title):
    text = page.write([altered(tmp_path / "run", compressing(layers))], tmp_path / "out").read_text()
    assert text.count("<figure>") == 8 + 2 and f"<figcaption>{title}</figcaption>" in text
    assert f"before compression {50 + (layers + 1) / 2:.1f} %; cnn1@0.75 {40 + (layers + 1) / 2:.1f} %" in text
    assert "aggregation 60.0 %; compression cnn1@0.5 20.0 %; dilation, mean of clients 35.0 %" in text
    assert "dilation_accuracy" not in text and "<td>4 MB</td><td>3 s</td>" in text


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


def test_damaged_run_stops_the_report_before_anything_is_written(tmp_path):
    with pytest.raises(JobError):
        page.write([record(tmp_path / "run"), tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_page_needs_nothing_but_itself(compared):
    text = (compared / "report.html").read_text()
    assert not re.search(r"https?:|<script|url\(|@import", text)
    sources = re.findall(r'<img src="([^"]*)"', text)
    assert len(sources) == text.count("<figure>") == 2 + 3 * 8 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert text.count("prefers-color-scheme: dark)\" srcset=") == len(sources)


def test_every_figure_has_a_caption_and_words_for_who_cannot_see_it(compared):
    text = (compared / "report.html").read_text()
    alternatives = re.findall(r'alt="([^"]*)"', text)
    assert len(alternatives) == text.count("<figcaption>") and min(map(len, alternatives)) > 30
    assert any("last, clients then between 50.0 % and 50.0 %" in text for text in alternatives)


def test_figures_are_also_png_and_svg_files_with_short_names(compared):
    files = sorted((compared / "figures").iterdir())
    assert len(files) == 2 * (2 + 3 * 8) and {file.stem for file in files if file.suffix == ".png"} == {file.stem for file in files if file.suffix == ".svg"}
    assert all(file.read_bytes()[:4] == b"\x89PNG" if file.suffix == ".png" else "<svg" in file.read_text()[:400] for file in files)
    assert max(len(file.name) for file in files) <= 30 and (compared / "figures" / "03-fedvtc-accuracy.svg").exists()


def test_runs_that_differ_only_in_seed_are_averaged(compared):
    text = (compared / "report.html").read_text()
    seeds = text[text.index("sample standard deviation over seeds"):text.index("<figure>")]
    seeds = seeds[:seeds.index("</table>")]
    assert "<b>53.8 ± 5.3</b>" in seeds and "<small>seeds 0, 1</small>" in seeds and seeds.count("<tr>") == 2      # one group


def test_names_out_of_files_cannot_become_markup(compared):
    text = (compared / "report.html").read_text()
    assert "<i>" not in text and "mlp<b>" not in text and "&lt;i&gt;$x" in text


def test_same_seed_twice_is_not_averaged(tmp_path):
    runs = [summary.read(record(tmp_path / name)) for name in ("a", "b")]
    assert [len(group) for group in labels.group_by_seed(runs)] == [1, 1]


def test_a_label_is_the_method_and_what_differs_within_it_in_whole_words(tmp_path):
    def method(name: str, **data: object):
        told = "".join(f"\n{key} = {json.dumps(value)}" for key, value in data.items())
        def change(file):
            file.attrs["algorithm"] = name
            file.attrs["job"] = file.attrs["job"].replace("fedvtc", name).replace('name = "digits"', f'name = "digits"{told}')
        return change
    long = ["a_rather_long_name_of_a_model", "another_rather_long_name_of_a_model"]
    runs = [altered(tmp_path / str(number), method(*each[:1], **each[1])) for number, each in enumerate(
        (("fedvtc", {"alpha": 0.1}), ("fedvtc", {"alpha": 1.0}), ("fedavg", {"alpha": 1.0}), ("fedavg", {"alpha": 1.0, "names": long})))]
    found = list(labels.label_groups([recording.read(run) for run in runs]))
    assert found == ["fedvtc, alpha 0.1", "fedvtc, alpha 1.0", "fedavg, alpha 1.0", f"fedavg, alpha 1.0, names [{' '.join(long)}]"]
    assert list(labels.label_groups([recording.read(runs[0])])) == ["fedvtc"]


def test_only_runs_that_would_be_confused_get_longer_labels(tmp_path):
    runs = [summary.read(record(tmp_path / name, name=title, lr=lr)) for name, title, lr in
            (("a", "one", 0.1), ("b", "one", 0.2), ("c", "two", 0.1), ("d", "three", 0.3), ("e", "three", 0.3))]
    assert list(labels.label_groups(runs)) == ["fedvtc, lr 0.1, one", "fedvtc, lr 0.2", "fedvtc, lr 0.1, two", "fedvtc, lr 0.3, d", "fedvtc, lr 0.3, e"]


def test_table_has_a_line_per_run_in_columns(tmp_path):
    lines = told([record(tmp_path / "a"), record(tmp_path / "b", lr=0.25, status="failed: disk full")]).splitlines()[:3]
    assert lines[0].startswith("run ") and lines[2].startswith("fedvtc, lr 0.25  failed") and "global" not in lines[0]
    assert len(set(map(len, lines))) == 1 and "30.0 (30.0 to 30.0)" in lines[1] and "125 B" in lines[1] and lines[1].endswith("10.0")


def test_means_over_seeds_are_in_the_terminal_and_in_every_format(tmp_path):
    runs = [record(tmp_path / "a"), record(tmp_path / "b", seed=1, right=1), record(tmp_path / "c", lr=0.2)]
    text = told(runs)
    seeds = text[text.index("mean ± sample standard deviation over seeds"):].splitlines()
    assert seeds[2].startswith("fedvtc, lr 0.1  0, 1 ") and "53.8 ± 5.3" in seeds[2] and seeds[3] == ""
    markdown = told(runs, "markdown").splitlines()
    assert markdown[0].startswith("| run | seeds |") and set(markdown[1]) <= set("| -:")
    assert "| fedvtc, lr 0.1 | 0, 1 | 2 | 53.8 ± 5.3 | fine-tuning |" in markdown[2]
    assert "| fedvtc, lr 0.2 | 0 | 2 | 50.0 | fine-tuning |" in markdown[3]
    latex = told(runs, "latex").splitlines()
    assert latex[0].startswith(r"\begin{tabular}{ll") and r"fedvtc, lr 0.1 & 0, 1 & 2 & 53.8 $\pm$ 5.3 & fine-tuning" in latex[4] and latex[4].endswith(r"\\")
    first, second = csv.DictReader(told(runs, "csv").splitlines())
    assert (first["run"], first["seeds"], float(first["generalization_percent_mean"])) == ("fedvtc, lr 0.1", "0 1", 53.75)
    assert float(first["generalization_percent_sd"]) == pytest.approx(3.75 * 2 ** 0.5)
    assert second["generalization_percent_sd"] == "" == first["global_percent_mean"]


def test_a_name_cannot_break_a_table(tmp_path):
    def odd(file):
        file.attrs["algorithm"] = "a&b_c|d,\"e\""
    run = altered(tmp_path / "run", odd)
    assert r"a\&b\_c|d," in told([run], "latex") and r"a&b_c\|d," in told([run], "markdown")
    assert next(csv.DictReader(told([run], "csv").splitlines()))["algorithm"] == 'a&b_c|d,"e"'


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


def test_the_command_reports_a_folder_of_runs_and_says_what_it_skipped(tmp_path, capsys):
    record(tmp_path / "runs" / "quickstart" / "a")
    record(tmp_path / "runs" / "quickstart" / "b", lr=0.2)
    (tmp_path / "runs" / "notes").mkdir()
    for arguments in (["--json"], ["--format", "csv"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["report", *map(str, sorted((tmp_path / "runs").iterdir())), *arguments])
        captured = capsys.readouterr()
        assert end.value.code == 0 and f"skipped {tmp_path / 'runs' / 'notes'}" in captured.err
        if arguments == ["--json"]:
            found = json.loads(captured.out)
            assert [run["label"] for run in found["runs"]] == [each["label"] for each in found["over_seeds"]] == ["fedvtc, lr 0.1", "fedvtc, lr 0.2"]
            assert found["over_seeds"][0]["accuracy"]["generalization"] == {"mean": 50.0, "sd": None}
    with pytest.raises(SystemExit) as end:
        cli.main(["report", str(tmp_path / "runs" / "notes")])
    assert end.value.code == 2


def test_a_run_in_which_nothing_is_averaged_says_so(tmp_path):
    def lonely(file):
        file.attrs["plan"] = json.dumps([{"phase": "train", "rounds": 2, "refines": "adopt", "averages": {"cnn1": 1, "mlp<b>": 1}}])
    folder = altered(tmp_path / "run", lonely)
    warning, = summary.summarise(folder)["warnings"]
    assert warning.startswith("fedvtc averages nothing here") and warning in told([folder])
    assert "<p class=warning>fedvtc averages nothing here" in page.write([folder], tmp_path / "out").read_text()
    assert summary.summarise(record(tmp_path / "other"))["warnings"] == []


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


def test_names_of_phases_do_not_overlap():
    figure = figures.draw_accuracy(canvas.LIGHT, {"clients": (0, np.arange(1, 41), np.full((40, 2), 50.0))}, 10.0,
                              [(0, "statistics"), (1, "warm-up"), (2, "generator"), (3, "rounds"), (38, "finetune"), (39, "calibrate")])
    figure.canvas.draw()
    names = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [text.get_window_extent() for text in names]
    assert len(names) == 6 and not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_what_is_reached_in_one_exchange_or_for_nothing_is_in_sight_among_costly_runs():
    runs = {"costly": [(np.array([1e6, 6e7]), np.array([20.0, 60.0]))], "one exchange": [(np.array([1e5]), np.array([99.0]))],
            "local": [(np.array([0.0, 0.0]), np.array([10.0, 30.0]))]}
    figure = figures.draw_overlay(canvas.LIGHT, runs, "bytes")
    figure.canvas.draw()
    axes = figure.axes[0]
    ends = {line.get_color(): line for line in axes.lines if line.get_markersize() == 8}
    assert len(ends) == 3 and not any(line.get_clip_on() for line in ends.values())
    left = [axes.transData.transform((line.get_xdata()[0], line.get_ydata()[0]))[0] for line in ends.values()]
    assert left[0] > left[1] > left[2] and min(np.diff(sorted(left))) > 20, "no two ends lie on each other, although 600 times the bytes part them"
    assert sum(bool(text.arrow_patch) for text in axes.texts) == 3, "from each end a line leads to the right"


def test_the_first_table_has_few_enough_columns_for_a_laptop(compared):
    first = (compared / "report.html").read_text().partition("Each run at its last evaluation</caption>")[2].partition("</thead>")[0]
    assert 5 <= first.count("<th ") <= 9


def test_the_page_begins_with_its_contents(compared):
    text = (compared / "report.html").read_text()
    anchors = re.findall(r"<li><a href=#([\w-]+)>", text)
    assert anchors == ["results", "comparison", "run-1", "run-2", "run-3"] and all(f'id="{anchor}"' in text for anchor in anchors)


def test_drawing_library_is_not_loaded_before_it_is_needed():
    code = "import sys, hpcfl.report.summary, hpcfl.report.hdf5_view; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
