"""What of its host a process may use: control groups of both versions, the launcher's cores, and the seconds that its threads had a core."""
import psutil
import pytest

from hpcfl.runs import host_limits


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
