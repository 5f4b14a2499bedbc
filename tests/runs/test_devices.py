"""A rank takes the GPU or the cores that are its own, and no device and no number of threads that would break what the job promises."""
import math
import os

import pytest
import torch

from hpcfl.errors import EnvironmentFault, JobError
from hpcfl.federation.world import World
from hpcfl.runs import devices
from hpcfl.wire.communicator import Alone, Communicator
from tests.support.tiny_runs import deterministic, tiny, write_job


@pytest.fixture
def gpus(monkeypatch):
    """Has torch see so many GPUs, and notes which one was chosen."""
    def see(count: int) -> list[torch.device]:
        chosen: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen
    return see


@pytest.mark.parametrize(("local_rank", "gpu"), [(0, 0), (1, 1), (2, 0), (5, 1)])
def test_ranks_of_a_host_take_its_gpus_in_turn(gpus, local_rank, gpu):
    chosen = gpus(2)
    assert devices.choose_device("auto", local_rank) == torch.device("cuda", gpu) == chosen[0]


def test_the_processor_is_used_where_it_is_wanted_or_all_there_is(gpus):
    gpus(2)
    assert devices.choose_device("cpu", 0) == torch.device("cpu")
    gpus(0)
    assert devices.choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(EnvironmentFault, match="torch sees no CUDA device"):
        devices.choose_device("cuda", 0)


def test_the_same_bits_take_one_thread():
    with pytest.raises(JobError, match=r"got run.threads = 2, wanted 0 or 1"):
        devices.choose_job_device(tiny("standalone", run={"deterministic": True, "threads": 2}), Communicator(Alone()))


@pytest.mark.parametrize(("bound", "quota", "wanted"), [({0, 1, 2, 3}, math.inf, 4), ({0, 1, 2, 3}, 2.5, 2.5), ({7}, math.inf, 1)])
def test_cores_are_those_bound_or_what_control_groups_grant(monkeypatch, bound, quota, wanted):
    monkeypatch.setattr(devices, "find_bound_cores", lambda: bound)
    monkeypatch.setattr(devices, "read_quota_cores", lambda: quota)
    assert devices.count_cores(Communicator(Alone())) == wanted


class Node:
    """Rank 0 of ranks of one host that are bound to the given cores."""

    def __init__(self, cores: list[set[int]]):
        self.cores = cores

    def gather(self, own: tuple[str, set[int]]) -> list[tuple[str, set[int]]]:
        return [(own[0], each) for each in self.cores]

    def share(self, value):
        return value


@pytest.mark.parametrize(("cores", "threads"), [
    ([{0, 1, 2, 3}], 4), ([{0, 1, 2, 3}] * 2, 2), ([{0, 1, 2, 3}, {4, 5, 6, 7}], 4), ([{0, 1, 2}] * 3, 1), ([{0, 1}, {1, 2}, {2, 3}], 1), ([{0}] * 4, 1)])
def test_a_rank_takes_its_part_of_the_cores_it_is_bound_to(cores, threads, monkeypatch):
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores[0], raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(devices, "read_quota_cores", lambda: math.inf)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    devices.set_threads(tiny("standalone", run={"threads": 0}), Node(cores))
    assert chosen == [threads]


@pytest.mark.parametrize(("quota", "variable", "settings", "threads"), [
    (3.5, "", {}, 1), (6.0, "", {}, 3), (math.inf, "2", {}, 2), (math.inf, "3,1", {}, 3), (math.inf, "many", {}, 32), (2.0, "16", {}, 1),
    (2.0, "1", {"threads": 5}, 5), (math.inf, "", {"deterministic": True}, 1)])
def test_control_groups_and_omp_num_threads_bound_the_threads_of_a_rank(quota, variable, settings, threads, monkeypatch):
    """Two ranks of a host with 64 cores."""
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(devices, "read_quota_cores", lambda: quota)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    devices.set_threads(tiny("standalone", run={"threads": 0} | settings), Node([set(range(64))] * 2))
    assert chosen == [threads]


@pytest.mark.parametrize(("case", "changes", "threads"), [
    ("fedavg", {}, 1), ("fedavg", {"run": {"threads": 3}}, 8), ("fedavg", {"training": {"engine": "vmap"}}, 8),
    ("gefl", {}, 8), ("fedavg", {"models": {"names": ["mlp2", "resnet8"]}, "data": {"image_size": 32}, "training": {"batch": 16}}, 8)])
def test_small_models_on_small_batches_train_on_one_thread(case, changes, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    left = [8]
    monkeypatch.setattr(torch, "set_num_threads", left.append)
    devices.spare_threads(World(tiny(case, **{"run": {"threads": 0}, **changes}), Communicator(Alone()), torch.device("cpu")))
    assert left[-1] == threads


def test_a_wanted_gpu_that_is_not_there_is_the_environment(hpcfl, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = hpcfl("run", write_job(tmp_path, tiny("standalone", run={"device": "cuda"})), "--out", tmp_path / "run")
    assert code == 3 and "run.device = 'cuda', but torch sees no CUDA device" in text and "set run.device = 'auto' to use the CPU" in text


def test_the_same_bits_are_not_promised_on_a_gpu(hpcfl, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "choose_device", lambda wanted, local_rank: torch.device("cuda", local_rank))
    code, text = hpcfl("run", write_job(tmp_path, deterministic(tiny("standalone"))), "--out", tmp_path / "run")
    assert code == 2 and "run.deterministic = true promises the same bits" in text and "set run.device = 'cpu'" in text


def test_a_gpu_computes_in_float32_and_not_in_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert devices.choose_device("auto", 3) == torch.device("cuda", 1)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_several_threads_are_refused_where_the_same_bits_are_promised(hpcfl, tmp_path):
    path = write_job(tmp_path, deterministic(tiny("standalone", run={"threads": 2})))
    for how in (["--out", tmp_path / "run"], ["--dry-run"]):
        code, text = hpcfl("run", path, *how)
        assert code == 2 and "run.deterministic = true promises the same bits, which take one thread for each rank" in text and "got run.threads = 2" in text
    assert hpcfl("run", path, "--set", "run.threads=1", "--out", tmp_path / "run")[0] == 0
