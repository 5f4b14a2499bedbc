"""The page: one file that needs nothing but itself, with its figures beside it."""
import re

import pytest

from hpcfl.errors import JobError
from hpcfl.report import page, summary
from tests.support.recorded_runs import altered, compressing, record


def test_load_balance_and_waiting_are_on_the_page(undrawn, tmp_path):
    run = record(tmp_path / "run")
    found = summary.summarise(run)
    assert found["load_balance"] == (3.0 + 2.0) / (2.0 + 1.5) and found["idle_share"] == 3.0 / 20.0
    text = page.write([run], tmp_path).read_text()
    assert "waiting 15.0 %, busiest rank 1.43 of the mean" in text and "<summary>Ranks</summary>" in text and "Waiting (%)" in text


@pytest.mark.parametrize(("layers", "title"), [(3, "Share of negative weights"), (11, "Share of negative weights, round 2")])
def test_page_shows_what_the_server_measured(undrawn, tmp_path, layers, title):
    text = page.write([altered(tmp_path / "run", compressing(layers))], tmp_path / "out").read_text()
    assert text.count("<figure>") == 8 + 2 and f"<figcaption>{title}</figcaption>" in text
    assert f"before compression {50 + (layers + 1) / 2:.1f} %; cnn1@0.75 {40 + (layers + 1) / 2:.1f} %" in text
    assert "aggregation 60.0 %; compression cnn1@0.5 20.0 %; dilation, mean of clients 35.0 %" in text
    assert "dilation_accuracy" not in text and "<td>4 MB</td><td>3 s</td>" in text


def test_damaged_run_stops_the_report_before_anything_is_written(tmp_path):
    with pytest.raises(JobError):
        page.write([record(tmp_path / "run"), tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_page_needs_nothing_but_itself(compared):
    text = (compared / "report.html").read_text()
    assert not re.search(r"https?:|<script|url\(|@import", text)
    sources = re.findall(r'<img src="([^"]*)"', text)
    assert len(sources) == text.count("<figure>") == 2 + 3 * 8 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert text.count("prefers-color-scheme: dark)\" srcset=") == len(sources)


def test_every_figure_has_a_caption_and_words_for_who_cannot_see_it(compared):
    text = (compared / "report.html").read_text()
    alternatives = re.findall(r'alt="([^"]*)"', text)
    assert len(alternatives) == text.count("<figcaption>") and min(map(len, alternatives)) > 30
    assert any("last, clients then between 50.0 % and 50.0 %" in text for text in alternatives)


def test_figures_are_also_png_and_svg_files_with_short_names(compared):
    files = sorted((compared / "figures").iterdir())
    assert len(files) == 2 * (2 + 3 * 8) and {file.stem for file in files if file.suffix == ".png"} == {file.stem for file in files if file.suffix == ".svg"}
    assert all(file.read_bytes()[:4] == b"\x89PNG" if file.suffix == ".png" else "<svg" in file.read_text()[:400] for file in files)
    assert max(len(file.name) for file in files) <= 30 and (compared / "figures" / "03-fedvtc-accuracy.svg").exists()


def test_names_out_of_files_cannot_become_markup(compared):
    text = (compared / "report.html").read_text()
    assert "<i>" not in text and "mlp<b>" not in text and "&lt;i&gt;$x" in text


def test_the_page_begins_with_its_contents(compared):
    text = (compared / "report.html").read_text()
    anchors = re.findall(r"<li><a href=#([\w-]+)>", text)
    assert anchors == ["results", "comparison", "run-1", "run-2", "run-3"] and all(f'id="{anchor}"' in text for anchor in anchors)
