"""What the tests of reports share: one report of three runs, and pages without the time that drawing takes."""
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hpcfl.report import canvas, page
from tests.support.recorded_runs import record


@pytest.fixture(scope="package")
def compared(tmp_path_factory) -> Path:
    """The folder of a report of three runs, two of which differ only in seed."""
    base = tmp_path_factory.mktemp("report")
    runs = [record(base / "a", seed=0), record(base / "b", seed=1, right=1), record(base / "c", name="<i>$x", lr=0.2, status="running")]
    page.write(runs, base / "out")
    return base / "out"


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Pages have a dot in place of each figure: for tests of what they say."""
    dot = canvas.to_png(lambda theme: Figure(figsize=(0.1, 0.1)))
    monkeypatch.setattr(canvas, "to_png", lambda draw, theme=canvas.LIGHT: dot)
    monkeypatch.setattr(canvas, "to_svg", lambda draw, theme=canvas.LIGHT: b"<svg/>")
