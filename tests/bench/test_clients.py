"""The benchmark of many clients: a process for each case, one case under mpirun, and what a process says of its memory."""
import json
from argparse import Namespace

import pytest

from hpcfl.bench.clients import measure_apart, read_memory
from hpcfl.errors import EnvironmentFault
from tests.support.tiny_runs import started

COLUMNS = ["ranks", "residency", "chunk", "clients", "round_s", "peak_memory_bytes", "before_bytes", "state_bytes"]


def test_each_case_of_many_clients_has_a_process_of_its_own(tmp_path):
    with started(tmp_path, "bench", "clients", "--clients", "3,4", "--residency", "disk", "--rounds", "1", "--threads", "1", "--json") as process:
        assert process.ends() == 0, process.text()
        rows = json.loads(process.text())["rows"]
    assert [list(row) for row in rows] == [COLUMNS] * 2
    assert [(row["ranks"], row["residency"], row["chunk"], row["clients"]) for row in rows] == [(1, "disk", 20, 3), (1, "disk", 20, 4)]
    assert all(row["peak_memory_bytes"] >= row["before_bytes"] > row["state_bytes"] > 0 and row["round_s"] > 0 for row in rows)
    assert rows[0]["state_bytes"] < rows[1]["state_bytes"]


def test_ranks_measure_one_case_and_refuse_several(tmp_path):
    with started(tmp_path, "bench", "clients", "--clients", "3", "--residency", "disk", "--chunk", "1",
                 "--rounds", "1", "--threads", "1", "--json", ranks=2) as process:
        assert process.ends() == 0, process.text()
        figures = json.loads(process.text())
    assert list(figures) == COLUMNS and (figures["ranks"], figures["chunk"]) == (2, 1)
    with started(tmp_path, "bench", "clients", "--clients", "3,4", "--residency", "disk", ranks=2) as process:
        assert process.ends() == 2 and "2 cases under mpirun, but a peak of memory belongs to a process" in process.text(), process.text()


def test_a_process_knows_its_memory_and_the_most_that_it_had():
    now, most = read_memory("VmRSS"), read_memory("VmHWM")
    assert 10 ** 6 < now <= most + 10 ** 6


@pytest.mark.parametrize(("ranks", "script", "said"), [
    (2, None, "mpirun: cannot be started .*; take --ranks 1"), (2, "echo first >&2; echo broken >&2; exit 3", "ended with exit code 3: broken")])
def test_a_case_that_fails_is_told_with_its_last_words(ranks, script, said, tmp_path, monkeypatch):
    if script:
        (tmp_path / "mpirun").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match=said):
        measure_apart(Namespace(chunk=None, rounds=1, threads=1, device="cpu"), ranks, "disk", 3)
