"""Which device and how many threads a rank uses."""
import math

import pytest
import torch

from hpcfl.errors import EnvironmentFault, JobError
from hpcfl.runs import devices
from hpcfl.wire.communicator import Alone, Communicator
from tests.support.tiny_runs import tiny


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
