"""Seconds of a call, and how figures are rounded."""
import time

import pytest
import torch

from hpcfl.bench.timing import measure_elapsed, median_seconds, time_call, to_milliseconds

CPU = torch.device("cpu")


def test_a_call_takes_as_long_as_it_sleeps():
    start = time.perf_counter()
    assert 0.02 <= time_call(lambda: time.sleep(0.02), CPU) <= measure_elapsed(start, CPU)


@pytest.mark.gpu
def test_on_a_gpu_the_device_has_finished():
    device, x = torch.device("cuda:0"), torch.rand(4096, 4096, device="cuda:0")
    done = torch.cuda.Event()
    time_call(lambda: (x @ x @ x, done.record()), device)
    assert done.query()


def test_figures_are_rounded_to_what_can_be_believed():
    assert median_seconds([3.0, 1.00006, 0.5]) == 1.0001 and to_milliseconds(0.0123456) == 12.346
