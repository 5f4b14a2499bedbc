"""Tables of the page: few columns, means over seeds, and which accuracy to report."""

from hpcfl.report import page
from tests.support.recorded_runs import three_ways


def test_page_says_that_the_best_on_test_is_selected_by_test_data(undrawn, tmp_path):
    text = page.write([three_ways(tmp_path / "run")], tmp_path / "out").read_text()
    assert "nothing selected it" in text and "<b>20.0" not in text
    rows = text[text.index("three ways</caption>"):]
    assert "Best on test, as published; selects by test data (%)" in rows[:rows.index("</thead>")]
    assert "<th scope=row class=word>a</th><td>20.0</td><td>40.0</td><td>45.0</td><td>2</td>" in rows
    assert "<th scope=row class=word>mean</th><td>25.0</td><td>45.0</td><td>52.5</td>" in rows


def test_three_ways_are_averaged_over_seeds(undrawn, tmp_path):
    runs = [three_ways(tmp_path / str(seed), seed=seed, better=better) for seed, better in enumerate((0, 2, 4))]
    text = page.write(runs, tmp_path / "out").read_text()
    seeds = text[text.index("Over architectures: mean ± sample standard deviation over seeds</caption>"):text.index("<figure>")]
    assert "<td>27.0 ± 2.0</td><td>45.0 ± 0.0</td><td>52.5 ± 0.0</td>" in seeds
    assert "Best on test, as published; selects by test data (%)" in seeds


def test_runs_that_differ_only_in_seed_are_averaged(compared):
    text = (compared / "report.html").read_text()
    seeds = text[text.index("sample standard deviation over seeds"):text.index("<figure>")]
    seeds = seeds[:seeds.index("</table>")]
    assert "<b>53.8 ± 5.3</b>" in seeds and "<small>seeds 0, 1</small>" in seeds and seeds.count("<tr>") == 2      # one group


def test_the_first_table_has_few_enough_columns_for_a_laptop(compared):
    first = (compared / "report.html").read_text().partition("Each run at its last evaluation</caption>")[2].partition("</thead>")[0]
    assert 5 <= first.count("<th ") <= 9
