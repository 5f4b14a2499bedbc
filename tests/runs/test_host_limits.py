"""What a process may use of its host: threads by the job, the cores and OMP_NUM_THREADS; processor time and memory by control groups."""
import math

import pytest

from hpcfl.runs import host_limits
from hpcfl.runs.host_limits import choose_threads, read_core_seconds, read_memory_left_bytes, read_quota_cores, read_thread_limit
from hpcfl.settings.sections import Run


@pytest.mark.parametrize(("settings", "cores", "limit", "threads"), [
    ({}, 8.0, math.inf, 8), ({}, 8.0, 3, 3), ({}, 2.5, math.inf, 2), ({}, 0.25, math.inf, 1), ({"threads": 5}, 2.0, 1, 5),
    ({"deterministic": True}, 8.0, math.inf, 1)])
def test_threads_are_those_of_the_job_or_one_for_each_core_that_may_be_used(settings, cores, limit, threads):
    assert choose_threads(Run(**settings), cores, limit) == threads


@pytest.mark.parametrize(("text", "limit"), [(None, math.inf), ("", math.inf), ("4", 4), ("4,2", 4), ("many", math.inf), ("0", math.inf)])
def test_omp_num_threads_counts_for_its_first_level_where_it_is_a_number(text, limit):
    assert read_thread_limit({} if text is None else {"OMP_NUM_THREADS": text}) == limit


@pytest.fixture
def group(tmp_path, monkeypatch):
    """The folder of a control group of version 2 two levels below the root, without limits."""
    (tmp_path / "own").write_text("0::/user/job\n")
    (tmp_path / "groups" / "user" / "job").mkdir(parents=True)
    monkeypatch.setattr(host_limits, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_limits, "OWN_GROUPS", tmp_path / "own")
    return tmp_path / "groups" / "user" / "job"


def test_the_tightest_quota_between_the_own_group_and_the_root_counts(group):
    assert read_quota_cores() == math.inf
    (group / "cpu.max").write_text("max 100000\n")
    assert read_quota_cores() == math.inf
    (group / "cpu.max").write_text("400000 100000\n")
    (group.parent / "cpu.max").write_text("150000 100000\n")
    assert read_quota_cores() == 1.5


def test_memory_that_a_group_only_keeps_of_files_is_left_and_nothing_is_less_than_none(group):
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 500000\ninactive_file 300000\n")
    assert read_memory_left_bytes() == 400_000
    (group / "memory.current").write_text("2000000\n")
    assert read_memory_left_bytes() == 0


def test_seconds_on_a_core_and_waiting_for_one_are_summed_over_the_threads(tmp_path, monkeypatch):
    for number, line in enumerate(("1500000000 250000000 7\n", "500000000 750000000 1\n", "")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "schedstat").write_text(line)
    monkeypatch.setattr(host_limits, "TASKS", tmp_path)
    assert read_core_seconds() == (2.0, 1.0)
    monkeypatch.setattr(host_limits, "TASKS", tmp_path / "none")
    assert read_core_seconds() == (0.0, 0.0)
