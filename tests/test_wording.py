"""Wording: bytes, seconds, counts, lists and tables in words, with their corner cases."""
import itertools
import math
import subprocess
import sys

import pytest

from hpcfl import wording
from hpcfl.wording import byte_text, count_text, duration_text, list_text, mean_sd_text, number_text, numbers_text, percent_text, range_text


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (0.25, "0.25 B"), (1, "1 B"), (8, "8 B"), (12.34, "12.3 B"), (999, "999 B"), (999.4, "999 B"), (999.5, "1 kB"), (1000, "1 kB"), (1005, "1 kB"),
    (1234567, "1.23 MB"), (4194304, "4.19 MB"), (999_499, "999 kB"), (999_600, "1 MB"), (5e9, "5 GB"), (7.5e10, "75 GB"), (5e12, "5 TB"), (5e15, "5 PB"),
    (1e15, "1 PB"), (9.996e14, "1 PB"), (1e18, "1000 PB"), (2.5e21, "2500000 PB"), (math.nan, "–"), (math.inf, "–"), (None, "–")])
def test_bytes_have_three_digits_and_the_unit_of_what_they_are_rounded_to(count, text):
    assert byte_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (0.0, "0 s"), (4.2e-6, "4.2 us"), (1.5e-8, "0.015 us"), (999.4e-6, "999 us"), (999.6e-6, "1 ms"), (0.0041, "4.1 ms"), (0.0123, "12.3 ms"),
    (0.9994, "999 ms"), (0.9996, "1 s"), (1, "1 s"), (1.5, "1.5 s"), (59.96, "60 s"), (90, "90 s"), (119.4, "119 s"), (119.6, "2 min"), (120, "2 min"),
    (999.5, "16.7 min"), (1000, "16.7 min"), (1500.0, "25 min"), (3600.0, "60 min"), (7100, "118 min"), (7199.9, "2 h"), (7200, "2 h"), (9000, "2.5 h"),
    (172_000, "47.8 h"), (172_800, "2 d"), (1e9, "11600 d"), (-3.0, "-3 s"), (math.nan, "–"), (math.inf, "–"), (None, "–")])
def test_seconds_have_three_digits_and_a_unit_of_which_they_are_some(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize("write", [byte_text, duration_text])
def test_from_small_to_large_no_unit_comes_twice_and_no_number_has_an_exponent(write):
    texts = [write(mantissa * 10.0 ** power) for power in range(-3, 20) for mantissa in (1, 1.2345, 3.3333, 9.994, 9.9951)]
    assert not any("e" in text for text in texts)
    units = [text.partition(" ")[2] for text in texts]
    assert len(list(itertools.groupby(units))) == len(set(units))


@pytest.mark.parametrize("write", [byte_text, duration_text, number_text, percent_text])
def test_what_is_not_known_is_a_dash_or_what_is_asked_for(write):
    assert [write(value) for value in (None, math.nan, math.inf, -math.inf)] == ["–"] * 4
    assert write(None, nothing="-") == "-" and write(math.nan, nothing="") == ""


@pytest.mark.parametrize(("largest", "unit"), [
    (0, ("B", 1.0)), (999, ("B", 1.0)), (1000, ("kB", 1e3)), (5e9, ("GB", 1e9)), (1e15, ("PB", 1e15)), (1e19, ("PB", 1e15))])
def test_an_axis_of_bytes_has_the_unit_of_its_largest(largest, unit):
    assert wording.choose_byte_unit(largest) == unit


def test_megabytes_are_equally_wide():
    assert [wording.megabytes_text(count) for count in (0, 1_234_000, 5e9)] == ["   0.000 MB", "   1.234 MB", "5000.000 MB"]


@pytest.mark.parametrize(("value", "digits", "text"), [
    (0, 1, "0.0"), (92.84, 1, "92.8"), (1.4286, 2, "1.43"), (999.5, 0, "1000"), (1000, 1, "1000.0"), (1e15, 0, "1" + "0" * 15)])
def test_numbers_have_the_digits_that_are_asked_for(value, digits, text):
    assert number_text(value, digits) == text


def test_percent_and_deviations():
    assert percent_text(92.84) == "92.8 %" and percent_text(0) == "0.0 %"
    assert mean_sd_text(92.84, 0.25) == "92.8 ± 0.2" and mean_sd_text(1000, 0) == "1000.0 ± 0.0"
    assert mean_sd_text(92.84, None) == "92.8" == mean_sd_text(92.84, math.nan), "one run has no deviation"
    assert mean_sd_text(None, None) == "–" == mean_sd_text(math.nan, 1.0) and mean_sd_text(None, None, nothing="-") == "-"


@pytest.mark.parametrize(("count", "nouns", "text"), [
    (1, ("rank",), "1 rank"), (0, ("rank",), "0 ranks"), (2, ("batch", "es"), "2 batches"), (1, ("batch", "es"), "1 batch")])
def test_a_count_has_its_noun(count, nouns, text):
    assert count_text(count, *nouns) == text


def test_a_range_is_a_number_where_all_are_alike():
    assert range_text([50, 50]) == "50" == range_text([50]) and range_text([52, 48, 50]) == "48 to 52"


def test_a_long_list_names_its_ends():
    assert list_text([]) == "" and list_text([1, "b"]) == "1, b" and list_text(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"
    assert list_text(range(13)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ... 12 (13 in all)"
    assert list_text([1, 2]) == "1, 2" and list_text(range(100)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ... 99 (100 in all)"


@pytest.mark.parametrize(("numbers", "how", "text"), [
    ([3], (), "rank 3"), ([0, 1, 2, 5, 7, 8], (), "ranks 0-2, 5, 7-8"), ([8, 0, 1], (), "ranks 0-1, 8"), ([], (), "no rank"), ([4], ("client",), "client 4"),
    ([1, 2, 3, 4], ("round", " to "), "rounds 1 to 4"), ([1, 2, 5], ("round", " to "), "rounds 1 to 2, 5"), (range(512), (), "ranks 0-511")])
def test_neighbours_among_numbers_stand_together(numbers, how, text):
    assert numbers_text(numbers, *how) == text


def test_a_leaf_is_its_shape_and_type():
    assert wording.leaf_text([3, 4], "torch.float32") == "(3, 4) float32" and wording.leaf_text((), "int64") == "() int64"


def test_what_is_alike_of_all_ranks_names_none():
    assert wording.shared_text({"a": [0, 1]}) == "a" and wording.shared_text({"a": [0, 2], "b": [1]}) == "ranks 0, 2: a; rank 1: b"


def test_ranks_that_say_the_same_stand_together():
    assert wording.reasons_text({0: "full", 1: "gone", 2: "full"}) == "ranks 0, 2: full; rank 1: gone" and wording.reasons_text({}) == ""


@pytest.mark.parametrize(("error", "text"), [
    (ValueError("first\nsecond"), "first"), (KeyError(), "KeyError"), (ValueError("  "), "ValueError"),
    (TypeError("cannot read <_io.BytesIO object at 0x7f00aa>"), "cannot read")])
def test_a_cause_is_one_line_without_addresses(error, text):
    assert wording.cause_text(error) == text


def test_control_characters_are_escaped():
    assert wording.printable_text("a\x1b[2Jb\n") == r"a\x1b[2Jb\n" and wording.printable_text("größer") == "größer"


def test_rows_are_aligned_text_on_the_left_and_numbers_on_the_right():
    rows = [("run", "n", "after", ""), ("a", "1", "x", "note"), ("longer", "1000", "yes", "")]
    assert wording.align_rows(rows, words=1, also=("after",)) == "run        n  after\na          1  x      note\nlonger  1000  yes"
    with pytest.raises(ValueError):
        wording.align_rows([("a", "b"), ("c",)], words=1)


def test_words_need_no_libraries():
    assert subprocess.run([sys.executable, "-c", "import sys, hpcfl.wording; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"]).returncode == 0
