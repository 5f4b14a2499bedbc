"""What a process may use of its host: threads by job, cores and OMP_NUM_THREADS; control groups of both versions; seconds that its threads had a core."""
import math

import psutil
import pytest

from hpcfl.runs import host_limits
from hpcfl.runs.host_limits import choose_threads, read_memory_left_bytes, read_quota_cores, read_thread_limit
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
def groups(tmp_path, monkeypatch):
    """Control groups in a folder: a function that writes /proc/self/cgroup and the files named."""
    def of(own: str, **files: str) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(host_limits, "OWN_GROUPS", tmp_path / "own")
        monkeypatch.setattr(host_limits, "GROUPS", tmp_path / "groups")
    return of


def test_limits_of_control_groups_of_version_2_hold_from_the_own_group_up_to_the_root(groups):
    groups("0::/job/step\n", **{"cpu.max": "max 100000", "job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000", "job/memory.max": "3000",
                                "job/memory.current": "2500", "job/memory.stat": "anon 2000\ninactive_file 400\n", "job/step/memory.max": "max",
                                "job/step/memory.current": "2500"})
    assert host_limits.read_quota_cores() == 1.5 and host_limits.read_memory_left_bytes() == 900


def test_limits_of_control_groups_of_version_1(groups):
    groups("4:memory:/slurm/job\n3:cpuset:/\n1:cpu,cpuacct:/slurm\n0::/\n", **{
        "cpu/slurm/cpu.cfs_quota_us": "400000", "cpu/slurm/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
        "memory/slurm/job/memory.limit_in_bytes": "5000", "memory/slurm/job/memory.usage_in_bytes": "4000", "memory/memory.limit_in_bytes": str(2 ** 63 - 4096),
        "memory/memory.usage_in_bytes": "4000"})
    assert host_limits.read_quota_cores() == 4.0 and host_limits.read_memory_left_bytes() == 1000


def test_without_control_groups_the_host_is_the_limit(groups):
    groups("0::/elsewhere\n")
    assert host_limits.read_quota_cores() == float("inf") and host_limits.read_memory_left_bytes() > 10 ** 6


def test_the_launcher_has_the_cores_of_the_parent_or_what_slurm_grants():
    parents = len(psutil.Process().parent().cpu_affinity())
    assert host_limits.read_launcher_cores({}) == parents and host_limits.read_launcher_cores({"SLURM_CPUS_ON_NODE": "1"}) == 1
    for told in ("9999", "", "8(x2)"):
        assert host_limits.read_launcher_cores({"SLURM_CPUS_ON_NODE": told}) == parents


def test_a_process_knows_how_long_it_had_a_core_and_how_long_it_waited(tmp_path, monkeypatch):
    for task, text in (("7", "1500000000 2500000000 3\n"), ("8", "500000000 0 1\n"), ("9", "")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(text)
    (tmp_path / "10").mkdir()                                      # a thread that is gone by now
    monkeypatch.setattr(host_limits, "TASKS", tmp_path)
    assert host_limits.read_core_seconds() == (2.0, 2.5)
    monkeypatch.setattr(host_limits, "TASKS", tmp_path / "none")
    assert host_limits.read_core_seconds() == (0.0, 0.0)


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
