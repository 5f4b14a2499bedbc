"""The command line and the launch say what is wrong before anything starts, and take no folder and no core that belongs to another."""
import json
import math
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcfl import cli, tree
from hpcfl.algorithms import PLANS
from hpcfl.algorithms.fedavg import FedAvg
from hpcfl.bench import w1_vtc
from hpcfl.errors import CheckpointError, JobError, LayoutError
from hpcfl.federation.world import World
from hpcfl.report import summary
from hpcfl.report.measures import REFINING
from hpcfl.runs import launch, simulation
from hpcfl.runs.examination import Examination
from hpcfl.wire.communicator import Alone, Communicator, connect
from tests.support.tiny_runs import carry_out, checkpoint_of, outcome, tiny, undisturbed, write_job


class Node:
    """Rank 0 of ranks of one host that are bound to the given cores."""

    def __init__(self, cores: list[set[int]]):
        self.cores = cores

    def gather(self, own: tuple[str, set[int]]) -> list[tuple[str, set[int]]]:
        return [(own[0], each) for each in self.cores]

    def share(self, value):
        return value


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return carry_out(tiny("standalone"), tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def sliced(tmp_path_factory) -> Path:
    return carry_out(tiny("heterofl", models={"names": ["cnn5"], "sizes": [0, 1]}, data={"fraction": 0.5}), tmp_path_factory.mktemp("sliced") / "run")


def ending(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
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
    with undisturbed():
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


@pytest.mark.parametrize(("cores", "threads"), [
    ([{0, 1, 2, 3}], 4), ([{0, 1, 2, 3}] * 2, 2), ([{0, 1, 2, 3}, {4, 5, 6, 7}], 4), ([{0, 1, 2}] * 3, 1), ([{0, 1}, {1, 2}, {2, 3}], 1), ([{0}] * 4, 1)])
def test_a_rank_takes_its_part_of_the_cores_it_is_bound_to(cores, threads, monkeypatch):
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores[0], raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(launch, "quota_cores", lambda: math.inf)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch.set_threads(tiny("standalone", run={"threads": 0}), Node(cores))
    assert chosen == [threads]


@pytest.mark.parametrize(("quota", "variable", "settings", "threads"), [
    (3.5, "", {}, 1), (6.0, "", {}, 3), (math.inf, "2", {}, 2), (math.inf, "3,1", {}, 3), (math.inf, "many", {}, 32), (2.0, "16", {}, 1),
    (2.0, "1", {"threads": 5}, 5), (math.inf, "", {"deterministic": True}, 1)])
def test_control_groups_and_omp_num_threads_bound_the_threads_of_a_rank(quota, variable, settings, threads, monkeypatch):
    """Two ranks of a host with 64 cores."""
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(launch, "quota_cores", lambda: quota)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    launch.set_threads(tiny("standalone", run={"threads": 0} | settings), Node([set(range(64))] * 2))
    assert chosen == [threads]


@pytest.mark.parametrize(("case", "changes", "threads"), [
    ("fedavg", {}, 1), ("fedavg", {"run": {"threads": 3}}, 8), ("fedavg", {"training": {"engine": "vmap"}}, 8),
    ("gefl", {}, 8), ("fedavg", {"models": {"names": ["mlp2", "resnet8"]}, "data": {"image_size": 32}, "training": {"batch": 16}}, 8)])
def test_small_models_on_small_batches_train_on_one_thread(case, changes, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    left = [8]
    monkeypatch.setattr(torch, "set_num_threads", left.append)
    launch.spare_threads(World(tiny(case, **{"run": {"threads": 0}, **changes}), Communicator(Alone()), torch.device("cpu")))
    assert left[-1] == threads


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


@pytest.mark.parametrize(("rounds", "place"), [(4, "round 4 of phase rounds"), (2, "behind its end")])
def test_a_checkpoint_that_lies_elsewhere_in_the_plan_is_refused(rounds, place, tmp_path):
    folder = carry_out(tiny("fedvtc", checkpoint={"every": 1, "keep": 9}), tmp_path / "run")
    changed = tiny("fedvtc", federation={"rounds": rounds}, checkpoint={"every": 1, "keep": 9})
    with pytest.raises(CheckpointError, match=f"its last round, 4, was round 1 of phase finetune; in this job that is {place}"):
        carry_out(changed, folder, may_differ=["federation.rounds"])
    carry_out(changed, tmp_path / "new", resume=checkpoint_of(folder, 2), may_differ=["federation.rounds"])
    assert outcome(tmp_path / "new").manifest["rows"] == rounds + 1


def test_models_that_no_step_touched_are_not_evaluated_again(tmp_path, monkeypatch):
    evaluated, asked = [], Examination._ask
    monkeypatch.setattr(Examination, "_asked", lambda self, group, known: evaluated.extend(group.clients) or asked(self, group, known))
    folder = carry_out(tiny("fedvtc", federation={"participation": 1.0, "rounds": 1}, evaluation={"every": 1}), tmp_path / "run")
    metrics = outcome(folder).metrics
    assert [stage.decode() for stage in metrics["evaluation/stage"]] == ["end", "before_refine", "end"]
    assert sorted(evaluated) == sorted([*range(5)] * 2), "after the round and after fine-tuning, not before it"
    assert (metrics["evaluation/generalization_correct"][0] == metrics["evaluation/generalization_correct"][1]).all()


def test_models_of_the_federation_are_evaluated_on_the_whole_test_set_at_the_end_of_a_round(tmp_path):
    job = tiny("fedavg", federation={"participation": 1.0}, evaluation={"every": 1, "batch": 50})
    metrics = outcome(carry_out(job, tmp_path / "run")).metrics
    end = metrics["evaluation/stage"] == b"end"
    assert metrics["evaluation/global_names"].tolist() == [b"cnn1", b"mlp2"]
    assert end.sum() == 3 and (metrics["evaluation/global_correct"][~end] == -1).all()
    for index, name in enumerate(metrics["evaluation/global_names"]):
        (holders,) = np.nonzero(metrics["clients/architecture"] == name)
        for client in holders:                                     # who has just adopted the average answers as it does
            assert metrics["evaluation/global_correct"][end, index].tolist() == metrics["evaluation/generalization_correct"][end, client].tolist()


def test_a_round_says_first_what_the_federations_own_models_are_worth(tmp_path, capsys):
    metrics = outcome(carry_out(tiny("heterofl", evaluation={"every": 1}, federation={"rounds": 1}), tmp_path / "sliced")).metrics
    _, legend, line, _ = capsys.readouterr().out.splitlines()
    images = metrics["evaluation/generalization_count"].sum()
    worth = 100 * metrics["evaluation/global_correct"][-1, 0].sum() / images
    clients = 100 * metrics["evaluation/generalization_correct"][-1].sum(1) / images
    assert f"  global {worth:5.1f}  clients {clients.mean():5.1f} [{clients.min():5.1f} ..{clients.max():5.1f}]  own " in line
    assert f"on the {images} test images. global: the federation's own models; clients: the models that clients hold" in legend
    carry_out(tiny("standalone", evaluation={"every": 1, "personal": False}, federation={"rounds": 1}), tmp_path / "alone")
    _, legend, line, _ = capsys.readouterr().out.splitlines()
    assert "global" not in legend + line and "  own " not in line and " clients " in line


@pytest.mark.parametrize(("clients", "alone"), [(2, "fedavg averages nothing here"), (3, "these have one client only, which averages with nobody: cnn1"),
                                                   (4, "")])
def test_clients_that_average_with_nobody_are_named_before_and_in_the_run(clients, alone, tmp_path, capsys):
    job = tiny("fedavg", federation={"clients": clients, "participation": 1.0, "rounds": 1})
    assert ending("run", write_job(tmp_path, job), "--dry-run") == 0
    assert [alone in line for line in capsys.readouterr().out.splitlines() if line.startswith("# warning: ")] == [True] * bool(alone)
    folder = carry_out(job, tmp_path / "run")
    assert [alone in line for line in (folder / "log" / "rank-0000.log").read_text().splitlines() if " WARNING fedavg averages" in line] == [True] * bool(alone)
    assert [alone in warning for warning in summary.summarise(folder)["warnings"]] == [True] * bool(alone)


@pytest.mark.parametrize("case", ["fedavg", "fedvtc", "ccvr", "gaussian", "fedproto", "fml", "gefl_f", "heterofl", "fedgh"])
def test_the_record_says_what_each_phase_does_last_and_with_how_many_clients_it_averages(case):
    job = tiny(case)
    plan = simulation._describe_plan(World(job, Communicator(Alone()), torch.device("cpu")))
    found = {each["phase"]: (each["refines"], each["averages"]) for each in plan}
    assert found == {"fedavg": {"rounds": ("adopt", {"cnn1": 2, "mlp2": 3})}, "fedproto": {"rounds": (None, {})}, "fml": {"rounds": (None, {"meme": 5})},
                     "fedvtc": {"rounds": (None, {}), "finetune": ("finetune", {})}, "fedgh": {"rounds": ("adopt", {})},
                     "ccvr": {"rounds": ("adopt", {"cnn1": 2, "common": 5, "mlp2": 3}), "calibrate": ("adopt", {})},
                     "gaussian": {"statistics": (None, {}), "classify": ("adopt", {})}, "heterofl": {"rounds": ("adopt", {"global": 5})},
                     "gefl_f": {"warmup": ("adopt", {"cnn1": 2, "cnn2_bn": 3, "common": 5}), "generator": (None, {}),
                                "targets": ("adopt", {"cnn1": 2, "cnn2_bn": 3, "common": 5})}}[case]


@pytest.mark.parametrize("method", PLANS)
def test_every_method_says_what_its_refining_is(method):
    steps = World(tiny(method), Communicator(Alone()), torch.device("cpu")).steps
    assert {step.refines for step in steps if step.overrides("refine")} <= REFINING.keys() - {"refine"}


def test_a_global_model_that_is_not_of_its_architecture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(FedAvg, "global_models", lambda self, message: {"odd": ("mlp2", tree.part(message, "cnn1"))})
    with pytest.raises(LayoutError, match="global model 'odd': '.*' is in only one of it and mlp2"):
        carry_out(tiny("fedavg"), tmp_path / "run")


def test_the_steps_of_generator_and_classifier_are_timed_in_every_way(monkeypatch):
    monkeypatch.setattr(w1_vtc, "WORKS", {"classifier": w1_vtc.run_classifier})
    figures = w1_vtc.vtc(Communicator(Alone()), Namespace(device="cpu", threads=1, steps=0, compile=False))
    assert [(row["work"], row["engine"], row["compile"]) for row in figures["rows"]] == [("classifier", "sequential", "off"), ("classifier", "vmap", "off")]
    assert all(row["step_s"] > 0 and row["resident_memory_bytes"] > 0 for row in figures["rows"])
    assert w1_vtc.render(figures).splitlines()[-3].split() == ["work", "engine", "compile", "first_s", "step_s", "steps_per_s", "resident_memory_bytes"]
