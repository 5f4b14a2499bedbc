"""Tables: runs and their means over seeds for the terminal, and as markdown, LaTeX and CSV."""
import csv
import json

import pytest

from hpcfl import cli
from hpcfl.report import summary, tables
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


def test_a_deviation_over_seeds_is_that_of_a_sample_and_needs_two(tmp_path):
    runs = [summary.summarise(record(tmp_path / str(seed), seed=seed, right=seed)) for seed in range(2)]
    both, alone = tables.average_seeds("x", runs), tables.average_seeds("x", runs[:1])
    assert both["seeds"] == [0, 1] and both["accuracy"]["generalization"] == {"mean": 53.75, "sd": pytest.approx(7.5 / 2 ** 0.5)}
    assert alone["accuracy"]["generalization"] == {"mean": 50.0, "sd": None} and alone["accuracy"]["global"] == {"mean": None, "sd": None}
    assert both["simulated_up_bytes_per_client"] == {"mean": 125.0, "sd": 0.0} and both["wall_s"] == {"mean": 10.0, "sd": 0.0}


@pytest.mark.parametrize(("rounds", "planned", "text"), [(2, 20, "2/20"), (20, 20, "20"), (20, None, "20"), (0, 3, "0/3")])
def test_progress_is_of_what_is_planned_where_some_is_to_come(rounds, planned, text):
    assert tables.progress_text({"rounds": rounds, "planned_rounds": planned}) == text


def test_a_status_that_says_more_than_a_word_is_a_note(tmp_path):
    text = told([record(tmp_path / "a", status="running?: on far-away"), record(tmp_path / "b", lr=0.2, status="failed: disk full")])
    assert "note: fedvtc, lr 0.1, seed 0: running?: on far-away" in text and "disk full" not in text
