"""The model of the wire: what a collective takes by its algorithms, the line that is fitted to what was timed, and what lies between two timed sizes."""
import numpy as np
import pytest

from hpcfl.wire.hockney import ALGORITHMS, Line, Timing, Wire, fit_line, fit_lines, interpolate_seconds

SIZES = (8, 4096, 262_144, 4_194_304)


def time_as_modelled(lines: dict[str, Line], ranks: int) -> list[Timing]:
    """What is timed of a wire that is as the model has it."""
    return [{"collective": name, "rank_bytes": count, "median_s": line.seconds(ALGORITHMS[name](ranks), count), "repetitions": 3}
            for count in SIZES for name, line in lines.items()]


@pytest.mark.parametrize(("collective", "count", "ranks", "seconds"), [
    ("Bcast", 100, 2, 1 + 100), ("Bcast", 100, 8, 6 + 175),         # 3 levels with 300 bytes, or 6 with 2 * 7/8 of 100
    ("Reduce", 1, 8, 3 + 3), ("Gatherv", 100, 4, 3 + 300), ("Bcast", 100, 1, 0), ("Gatherv", 0, 4, 0)])
def test_a_collective_takes_the_steps_of_its_quickest_algorithm(collective, count, ranks, seconds):
    assert Wire(dict.fromkeys(ALGORITHMS, Line(1.0, 1.0)), "a toy").seconds(collective, count, ranks) == seconds


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_wire_that_is_as_the_model_has_it_is_found_again(ranks):
    wanted = {"Bcast": Line(2e-6, 8e-11), "Reduce": Line(5e-5, 1e-9), "Gatherv": Line(1e-2, 1e-10)}
    lines, worst = fit_lines(time_as_modelled(wanted, ranks), ranks)
    assert worst < 0.01
    for name, line in wanted.items():
        assert (lines[name].latency_s, lines[name].byte_s) == pytest.approx((line.latency_s, line.byte_s), rel=0.01), name


def test_a_fit_is_by_relative_errors_and_never_negative():
    near = fit_line(ALGORITHMS["Gatherv"](2), np.array([8.0, 4096.0, 262144.0, 4194304.0]), 1.05 ** np.array([1, -1, 1, -1]) * 1e-5
                       * (1 + np.array([8.0, 4096.0, 262144.0, 4194304.0]) / 1e5))
    assert near.latency_s == pytest.approx(1e-5, rel=0.06) and near.byte_s == pytest.approx(1e-10, rel=0.06)      # though the largest takes 40 times the least
    falling = fit_line(ALGORITHMS["Gatherv"](2), np.array([8.0, 4096.0, 4194304.0]), np.array([3e-5, 2e-5, 1e-5]))
    assert falling.byte_s == 0 and 1e-5 < falling.latency_s < 3e-5
    steep = fit_line(ALGORITHMS["Gatherv"](2), np.array([1000.0, 2000.0]), np.array([1e-6, 4e-6]))
    assert steep.latency_s == 0 and steep.byte_s > 0


WIRE: list[Timing] = [{"collective": "Bcast", "rank_bytes": size, "median_s": seconds, "repetitions": 3}
                      for size, seconds in ((8, 1.0), (108, 2.0), (1000, 4.0))]


def test_a_collective_takes_what_lies_between_or_beyond_those_that_were_timed():
    assert [interpolate_seconds(WIRE, "Bcast", count) for count in (0, 4, 8, 58, 108, 554, 1000, 3000)] == [0, 1, 1, 1.5, 2, 3, 4, 12]
    assert interpolate_seconds(WIRE, "Reduce", 100) == interpolate_seconds([], "Bcast", 100) == 0
