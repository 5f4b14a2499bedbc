"""Timing: seconds of work on a device, and how figures are rounded."""
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch


def measure_elapsed(start: float, device: torch.device) -> float:
    """Seconds since `start` of time.perf_counter, once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_call(carry_out: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, until the device has finished."""
    start = time.perf_counter()
    carry_out()
    return measure_elapsed(start, device)


def median_seconds(laps: Sequence[float]) -> float:
    """The median of laps, to a tenth of a millisecond."""
    return round(median(laps), 4)


def to_milliseconds(seconds: float) -> float:
    """Milliseconds, to a microsecond."""
    return round(1000 * seconds, 3)
