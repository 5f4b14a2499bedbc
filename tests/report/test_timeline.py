"""The timeline: what a ledger books has a beginning and an end, what ranks do at one time stands side by side, and the file is what viewers read."""
import json
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpcfl import cli
from hpcfl.accounts import SECONDS
from hpcfl.errors import CheckpointError, JobError
from hpcfl.federation.ledger import Ledger
from hpcfl.report import summary, timeline
from hpcfl.report.recording import read
from tests.support.tiny_runs import carry_out, outcome, started, tiny, write_job

LATE_ON_RANK_1 = """
import os, time
from hpcfl.algorithms.standalone import Standalone
train = Standalone.train

def late(self, group, message, site):
    if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
        time.sleep(0.3)
    return train(self, group, message, site)
Standalone.train = late
"""


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> Path:
    """A run on two ranks of which rank 1 needs 0.3 s longer for each group that it trains."""
    folder = tmp_path_factory.mktemp("late")
    path = write_job(folder, tiny("standalone", federation={"participation": 1.0, "rounds": 2}, checkpoint={"every": 1}))
    with started(folder, "run", path, "--out", folder / "run", ranks=2, fault=LATE_ON_RANK_1) as job:
        assert job.ends() == 0, job.text()
    return folder / "run"


def booked() -> dict:
    """The account of a round in which something was interrupted by something else."""
    ledger = Ledger(torch.device("cpu"))
    with ledger("checkpoint"):
        time.sleep(0.01)
    ledger.open()
    with ledger("aggregate"):
        time.sleep(0.01)
        with ledger("idle"):
            time.sleep(0.02)
        time.sleep(0.01)
    with ledger("train"):
        pass                                                       # too short to be seen
    return ledger.close()


def test_intervals_follow_each_other_and_add_up_to_the_seconds():
    account = booked()
    kinds, starts, durations = (account["intervals"][name] for name in ("kind", "start_s", "duration_s"))
    assert [SECONDS[kind] for kind in kinds] == ["checkpoint", "aggregate", "idle", "aggregate"]
    assert starts[0] < 0 <= starts[1] and (starts[1:] >= (starts + durations)[:-1] - 1e-6).all()
    for kind, name in enumerate(SECONDS):
        assert durations[kinds == kind].sum() == pytest.approx(account["seconds"][name], abs=2e-5)
    assert durations[2] >= 0.02


def test_a_round_begins_with_no_intervals_of_the_round_before():
    ledger = Ledger(torch.device("cpu"))
    with ledger("train"):
        time.sleep(0.001)
    assert len(ledger.close()["intervals"]["kind"]) == 1
    time.sleep(0.01)
    ledger.open()
    account = ledger.close()
    assert len(account["intervals"]["kind"]) == 0 and account["opened_s"] >= 0.01


def test_spread_work_leaves_the_seconds_of_one_item_of_each_piece():
    ledger = Ledger(torch.device("cpu"))
    for items, seconds in ((4, 2.0), (0, 0.25), (2, 1.0)):
        ledger.book_help(items, seconds)
    assert [ledger.close()["item_s"], ledger.close()["item_s"]] == [1.25, 0.0]


def test_no_rank_does_two_things_at_once_and_ranks_wait_for_each_other(late):
    table = {name: values for name, values in outcome(late).metrics.items() if name.startswith("trace/")}
    rank, kind, start, duration = (table[f"trace/{name}"] for name in ("rank", "kind", "start_s", "duration_s"))
    assert set(rank) == {0, 1} and set(table["trace/row"]) == {0, 1}
    for own in (0, 1):
        assert (start[rank == own][1:] >= (start + duration)[rank == own][:-1] - 1e-4).all()
    trained = [(start + duration)[(rank == own) & (kind == SECONDS.index("train"))].max() for own in (0, 1)]
    longest = np.argmax(np.where((rank == 0) & (kind == SECONDS.index("idle")), duration, 0))
    assert trained[1] > trained[0] and duration[longest] > 0.2
    within = [(start[longest] < time_ < (start + duration)[longest] + 0.1) for time_ in (start + duration)[(rank == 1) & (kind == SECONDS.index("train"))]]
    assert any(within), "rank 0 does not wait while rank 1 trains"


def test_the_trace_has_a_row_for_the_rounds_and_for_each_rank(late, tmp_path):
    path = timeline.write([late], tmp_path / "deep" / "trace.json")
    found = json.loads(path.read_text())["traceEvents"]
    assert {event["args"]["name"] for event in found if event["name"] == "thread_name"} == {"rounds", "rank 0", "rank 1"}
    rounds = [event for event in found if event.get("cat") == "round"]
    work = [event for event in found if event.get("cat") == "work"]
    assert [(event["name"], event["tid"]) for event in rounds] == [("rounds 1", 0), ("rounds 2", 0)]
    assert len(work) == len(outcome(late).metrics["trace/row"]) and {event["tid"] for event in work} == {1, 2} and {event["pid"] for event in work} == {0}
    assert {event["name"] for event in work} <= set(SECONDS) and {event["args"]["phase"] for event in work} == {"rounds"}
    for event in work:
        whole = rounds[event["args"]["round"] - 1]
        assert event["ph"] == "X" and whole["ts"] <= event["ts"] and event["ts"] + event["dur"] <= whole["ts"] + whole["dur"] + 0.2
    seconds = sum(event["dur"] for event in work if event["name"] == "train" and event["tid"] == 2) / 1e6
    assert seconds == pytest.approx(outcome(late).metrics["seconds/train"][:, 1].sum(), abs=1e-4)


def test_the_last_checkpoint_is_in_the_record(tmp_path):
    metrics = outcome(carry_out(tiny("standalone", checkpoint={"every": 100}), tmp_path / "run")).metrics
    kind, row, duration = (metrics[f"trace/{name}"] for name in ("kind", "row", "duration_s"))
    saving, seconds = kind == SECONDS.index("checkpoint"), metrics["seconds/checkpoint"][:, 0]
    assert seconds[-1] > 0 and not seconds[:-1].any()
    assert set(row[saving]) == {len(seconds) - 1} and duration[saving].sum() == pytest.approx(seconds[-1], abs=1e-4)


def test_several_runs_are_processes_side_by_side(late, tmp_path):
    other = carry_out(tiny("standalone"), tmp_path / "other")
    found = json.loads(timeline.write([late, other, late], tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in found} == {0, 1}


def test_the_command_line_writes_the_trace_into_the_folder_or_where_it_is_told(late, tmp_path, capsys):
    for arguments, path in ((["--trace"], late / "trace.json"), (["--trace", tmp_path / "own.json"], tmp_path / "own.json"),
                            (["--out", tmp_path, "--trace"], tmp_path / "trace.json")):
        with pytest.raises(SystemExit) as end:
            cli.main(["report", str(late), *map(str, arguments)])
        assert end.value.code == 0 and f"trace: {path} " in capsys.readouterr().out and json.loads(path.read_text())["traceEvents"]
    assert not (tmp_path / "report.html").exists()
    (late / "trace.json").unlink()


def test_a_trace_that_cannot_be_written_is_said(late, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JobError, match="cannot write the trace: .*name another file with --trace FILE"):
        timeline.write([late], tmp_path / "file" / "trace.json")


def test_a_record_that_knows_no_intervals_is_refused(late, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.h5").write_bytes((late / "metrics.h5").read_bytes())
    with h5py.File(tmp_path / "old" / "metrics.h5", "r+") as file:
        del file["trace"]
    with pytest.raises(JobError, match="for how long each rank worked, but not when"):
        timeline.write([tmp_path / "old"], tmp_path / "trace.json")
    assert summary.summarise(tmp_path / "old")["rounds"] == 2


def test_intervals_of_unfinished_rounds_are_left_out_and_odd_ones_refused(late, tmp_path):
    for name, change in (("longer", {"row": np.array([0, 7]), "rank": np.array([0, 0])}), ("odd", {"row": np.array([0, 1, 1])})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.h5").write_bytes((late / "metrics.h5").read_bytes())
        with h5py.File(tmp_path / name / "metrics.h5", "r+") as file:
            for each in ("row", "rank", "kind", "start_s", "duration_s"):
                values = change.get(each, file[f"trace/{each}"][:2])
                del file[f"trace/{each}"]
                file[f"trace/{each}"] = values
    assert len(read(tmp_path / "longer").arrays["trace/start_s"]) == 1
    with pytest.raises(CheckpointError, match="'trace/row' is"):
        read(tmp_path / "odd")


def test_load_balance_is_the_busiest_rank_over_the_mean_one(late):
    found = summary.summarise(late)
    assert 1.2 < found["load_balance"] <= 2.0 and 0.05 < found["idle_share"] < 1
    alone = {"seconds": {"train": np.array([[1.0, 3.0], [4.0, 0.0]]), "idle": np.array([[9.0, 9.0], [0.0, 0.0]])}}
    assert summary._load_balance(alone["seconds"]) == (3 + 4) / (2 + 2)
    assert summary._load_balance({}) is None and summary._load_balance({"train": np.zeros((0, 2))}) is None
