"""Tables of the page: few columns, means over seeds, and which accuracy to report."""

from hpcfl.report import page, page_tables
from hpcfl.wording import NOTHING
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


def test_which_accuracy_to_report_stands_once_beside_its_table(undrawn, tmp_path):
    alone = page.write([three_ways(tmp_path / "alone")], tmp_path / "one").read_text()
    assert alone.count("<p class=note id=ways>") == 1 and "<a href=#ways>" not in alone
    assert alone.index("three ways</caption>") < alone.index("id=ways") < alone.index("<div class=figures>")
    assert alone.partition("three ways</caption>")[2].partition("</table></div>")[2].lstrip().startswith("<p class=note id=ways>")
    several = page.write([three_ways(tmp_path / str(seed), seed=seed) for seed in range(2)], tmp_path / "two").read_text()
    over_seeds = several.partition("Over architectures: mean ± sample standard deviation over seeds</caption>")[2]
    assert over_seeds.partition("</table></div>")[2].lstrip().startswith("<p class=note id=ways>")
    assert several.count("id=ways") == 1 and several.count("<a href=#ways>") == 2


def test_a_column_in_which_nothing_is_known_is_left_out_and_words_start_on_the_left():
    columns = {"Phase": lambda name, _: name, "Known": lambda _, value: str(value), "Unknown": lambda *_: NOTHING}
    text = page_tables.render_table("What it is", columns, [("a", 1), ("b", NOTHING)])
    assert "Unknown" not in text and "<th scope=col class=word>Phase</th><th scope=col>Known</th>" in text
    assert "<tr><th scope=row class=word>a</th><td>1</td></tr><tr><th scope=row class=word>b</th><td>–</td></tr>" in text


def test_operations_have_a_unit():
    assert page_tables._flops_text(None) == "–" and page_tables._flops_text(2e6) == "2.00 MFLOP" and page_tables._flops_text(1500) == "1.50 kFLOP"
