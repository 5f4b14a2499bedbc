"""Lone clients: a run in which nothing, or some part, is averaged says so."""
import json

import pytest

from hpcfl.report import lone_clients, page, summary
from tests.support.recorded_runs import altered, record, told


def test_a_run_in_which_nothing_is_averaged_says_so(undrawn, tmp_path):
    def lonely(file):
        file.attrs["plan"] = json.dumps([{"phase": "train", "rounds": 2, "refines": "adopt", "averages": {"cnn1": 1, "mlp<b>": 1}}])
    folder = altered(tmp_path / "run", lonely)
    warning, = summary.summarise(folder)["warnings"]
    assert warning.startswith("fedvtc averages nothing here") and warning in told([folder])
    assert "<p class=warning>fedvtc averages nothing here" in page.write([folder], tmp_path / "out").read_text()
    assert summary.summarise(record(tmp_path / "other"))["warnings"] == []


@pytest.mark.parametrize(("found", "text"), [
    ({}, None), ({"cnn1": 2, "cnn2": 3}, None),
    ({"cnn1": 1, "cnn2": 2}, "fedavg averages models of one architecture, and these have one client only, which averages with nobody: cnn1"),
    ({f"c{n}": 1 for n in range(8)} | {"d": 2}, "fedavg averages models of one architecture, and these have one client only, which averages with nobody: "
                                                "c0, c1, c2, c3, c4, c5 and 2 more")])
def test_parts_that_one_client_averages_with_nobody_are_named(found, text):
    assert lone_clients.warning_text("fedavg", found) == text


def test_where_nothing_is_averaged_the_way_out_is_told():
    text = lone_clients.warning_text("fedavg", {"cnn1": 1, "cnn2": 1})
    assert text.startswith("fedavg averages nothing here") and "(cnn1, cnn2)" in text
    assert text.endswith("Clients of one architecture (models.names) would average")
