"""Measures: what each accuracy is called after, and which one is a run's result."""
import json

import pytest

from hpcfl.report import page, summary
from tests.support.recorded_runs import altered, planned, told


@pytest.mark.parametrize(("word", "key", "said"), [("adopt", "before_adopt", "adopting the server's model"), ("finetune", "before_finetune", "fine-tuning"),
                                                   ("refine", "before_refine", "refining on what the server made")])
def test_models_before_the_last_work_are_called_after_what_that_work_is(undrawn, tmp_path, word, key, said):
    folder = altered(tmp_path / "run", planned(train=word))
    accuracy = summary.summarise(folder)["accuracy"]
    assert accuracy["refine"] == word and accuracy[key]["per_client"] == [30.0, 30.0] and f"recall_{key}" in accuracy and key in accuracy["absent_classes"]
    assert sorted(name for name in accuracy if name.startswith("before_")) == [key]
    assert accuracy["described"][key] == f"clients' models as they trained them, before {said}, on the whole test set"
    assert accuracy["described"]["generalization"] == f"clients' models at the end of the round, after {said}, on the whole test set"
    assert accuracy["described"].keys() == {"generalization", "personal", "absent_classes", key}
    text, line = page.write([folder], tmp_path / "out").read_text(), told([folder]).splitlines()[1]
    assert f"Clients before and after {said}" in text.replace("&#x27;", "'") and said.split()[0] in line.split()
    assert (word == "finetune") == ("fine-tuning" in text + told([folder])), "only what fine-tunes is called so"


def test_a_run_that_is_not_finished_has_no_result_yet(tmp_path):
    def longer(file):
        file.attrs["plan"] = json.dumps([{"phase": "train", "rounds": 20, "refines": None, "averages": {}}])
    folder = altered(tmp_path / "run", longer)
    assert "only 2 of 20 rounds are finished" in summary.summarise(folder)["accuracy"]["report"]["why"]
    assert " 2/20 " in told([folder]).splitlines()[1] and "only 2 of 20 rounds are finished" in told([folder])
