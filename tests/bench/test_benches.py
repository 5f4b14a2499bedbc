"""Every benchmark has one name, which the command line takes, and figures are shown one a line with rows as a table."""
import pytest

from hpcfl import cli
from hpcfl.bench.benches import BENCHES, render


def test_the_command_line_takes_the_names_of_the_table(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "no-such-benchmark"])
    said = capsys.readouterr().err
    assert all(name in said for name in BENCHES)


@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_is_a_function_of_its_name(name):
    assert BENCHES[name].__name__ == name and BENCHES[name].__doc__


def test_figures_stand_one_a_line_and_rows_in_a_table():
    lines = render({"ranks": 2, "rows": [{"phase": "first", "round_s": 0.5}, {"phase": "then", "round_s": 12.25}]}).splitlines()
    assert lines[0].split() == ["ranks", "2"] and lines[1].split() == ["phase", "round_s"] and lines[3].split() == ["then", "12.25"]
    assert render({"round_s": 1.5}).split() == ["round_s", "1.5"] and render({"rows": []}) == ""
