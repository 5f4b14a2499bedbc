"""The settings in jobs/README.md are those that the command prints."""
from pathlib import Path

from hpcfl.runs.choices import CHOICES
from hpcfl.settings import manual

PAPER = Path(__file__).resolve().parents[2] / "jobs" / "README.md"
BEGIN, END = "<!-- settings -->", "<!-- end of settings -->"


def test_the_paper_has_the_settings_as_they_are_printed():
    text = PAPER.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    written = text.partition(BEGIN)[2].partition(END)[0].strip("\n")
    assert written == manual.markdown(manual.blocks(CHOICES), CHOICES), f"write between {BEGIN} and {END} what this prints: hpcfl settings --markdown"
