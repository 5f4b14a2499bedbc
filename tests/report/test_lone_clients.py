"""Lone clients: a run in which nothing, or some part, is averaged says so."""
import json

from hpcfl.report import page, summary
from tests.support.recorded_runs import altered, record, told


def test_a_run_in_which_nothing_is_averaged_says_so(undrawn, tmp_path):
    def lonely(file):
        file.attrs["plan"] = json.dumps([{"phase": "train", "rounds": 2, "refines": "adopt", "averages": {"cnn1": 1, "mlp<b>": 1}}])
    folder = altered(tmp_path / "run", lonely)
    warning, = summary.summarise(folder)["warnings"]
    assert warning.startswith("fedvtc averages nothing here") and warning in told([folder])
    assert "<p class=warning>fedvtc averages nothing here" in page.write([folder], tmp_path / "out").read_text()
    assert summary.summarise(record(tmp_path / "other"))["warnings"] == []
