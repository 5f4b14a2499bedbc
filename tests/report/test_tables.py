"""Tables: runs and their means over seeds for the terminal, and as markdown, LaTeX and CSV."""
import csv
import json

import pytest

from hpcfl import cli
from tests.support.recorded_runs import altered, record, told


def test_table_has_a_line_per_run_in_columns(tmp_path):
    lines = told([record(tmp_path / "a"), record(tmp_path / "b", lr=0.25, status="failed: disk full")]).splitlines()[:3]
    assert lines[0].startswith("run ") and lines[2].startswith("fedvtc, lr 0.25  failed") and "global" not in lines[0]
    assert len(set(map(len, lines))) == 1 and "30.0 (30.0 to 30.0)" in lines[1] and "125 B" in lines[1] and lines[1].endswith("10.0")


def test_means_over_seeds_are_in_the_terminal_and_in_every_format(tmp_path):
    runs = [record(tmp_path / "a"), record(tmp_path / "b", seed=1, right=1), record(tmp_path / "c", lr=0.2)]
    text = told(runs)
    seeds = text[text.index("mean ± sample standard deviation over seeds"):].splitlines()
    assert seeds[2].startswith("fedvtc, lr 0.1  0, 1 ") and "53.8 ± 5.3" in seeds[2] and seeds[3] == ""
    markdown = told(runs, "markdown").splitlines()
    assert markdown[0].startswith("| run | seeds |") and set(markdown[1]) <= set("| -:")
    assert "| fedvtc, lr 0.1 | 0, 1 | 2 | 53.8 ± 5.3 | fine-tuning |" in markdown[2]
    assert "| fedvtc, lr 0.2 | 0 | 2 | 50.0 | fine-tuning |" in markdown[3]
    latex = told(runs, "latex").splitlines()
    assert latex[0].startswith(r"\begin{tabular}{ll") and r"fedvtc, lr 0.1 & 0, 1 & 2 & 53.8 $\pm$ 5.3 & fine-tuning" in latex[4] and latex[4].endswith(r"\\")
    first, second = csv.DictReader(told(runs, "csv").splitlines())
    assert (first["run"], first["seeds"], float(first["generalization_percent_mean"])) == ("fedvtc, lr 0.1", "0 1", 53.75)
    assert float(first["generalization_percent_sd"]) == pytest.approx(3.75 * 2 ** 0.5)
    assert second["generalization_percent_sd"] == "" == first["global_percent_mean"]


def test_a_name_cannot_break_a_table(tmp_path):
    def odd(file):
        file.attrs["algorithm"] = "a&b_c|d,\"e\""
    run = altered(tmp_path / "run", odd)
    assert r"a\&b\_c|d," in told([run], "latex") and r"a&b_c\|d," in told([run], "markdown")
    assert next(csv.DictReader(told([run], "csv").splitlines()))["algorithm"] == 'a&b_c|d,"e"'


def test_the_command_reports_a_folder_of_runs_and_says_what_it_skipped(tmp_path, capsys):
    record(tmp_path / "runs" / "quickstart" / "a")
    record(tmp_path / "runs" / "quickstart" / "b", lr=0.2)
    (tmp_path / "runs" / "notes").mkdir()
    for arguments in (["--json"], ["--format", "csv"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["report", *map(str, sorted((tmp_path / "runs").iterdir())), *arguments])
        captured = capsys.readouterr()
        assert end.value.code == 0 and f"skipped {tmp_path / 'runs' / 'notes'}" in captured.err
        if arguments == ["--json"]:
            found = json.loads(captured.out)
            assert [run["label"] for run in found["runs"]] == [each["label"] for each in found["over_seeds"]] == ["fedvtc, lr 0.1", "fedvtc, lr 0.2"]
            assert found["over_seeds"][0]["accuracy"]["generalization"] == {"mean": 50.0, "sd": None}
    with pytest.raises(SystemExit) as end:
        cli.main(["report", str(tmp_path / "runs" / "notes")])
    assert end.value.code == 2
