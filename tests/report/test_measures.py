"""Measures: what each accuracy is called after, and which one is a run's result."""
import json

import pytest

from hpcfl.report import measures, page, summary
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


def accuracies(**means: float | None) -> dict:
    """What a summary has of accuracies, as far as measures read it."""
    return {"generalization": {"mean": None}, "personal": {"mean": None}, "absent_classes": {"mean": None}, "refine": None,
            **{key: {"mean": mean} for key, mean in means.items()}}


@pytest.mark.parametrize(("means", "rounds", "planned", "measure", "why"), [
    ({"generalization": 50.0}, 2, 2, "generalization", "no model but those of its clients; at the end of a number of rounds fixed beforehand"),
    ({"generalization": 50.0, "global": 60.0}, 2, None, "global", "the method's own models, made for everybody; at the end of a number"),
    ({"generalization": 50.0, "global": None}, 3, 2, "generalization", "no model but those"),
    ({"generalization": 50.0}, 1, 2, "generalization", "but only 1 of 2 rounds are finished")])
def test_the_result_is_of_the_federations_own_model_where_it_has_one(means, rounds, planned, measure, why):
    found = measures.choose_result(accuracies(**means), rounds, planned)
    assert found["measure"] == measure and found["mean"] == means[measure] and why in found["why"]


def test_only_what_was_measured_is_described():
    assert measures.describe_accuracies(accuracies()) == {}
    assert measures.describe_accuracies(accuracies(personal=1.0)) == {
        "personal": "clients' models at the end of the round, after local training, on held-out images of the client's own distribution"}


def test_what_clients_did_last_has_a_word_and_words():
    assert [measures.after_text(word) for word in (None, "adopt", "finetune", "refine")] == ["training", "adopting", "fine-tuning", "refining"]
    assert measures.after_all_text(None) == "local training" and set(measures.REFINING) == {"adopt", "finetune", "refine"}


def test_before_is_looked_for_under_what_the_work_is_called():
    before = measures.MEASURES["before"].select
    assert before({**accuracies(), "refine": "adopt", "before_adopt": {"mean": 7.0}}) == {"mean": 7.0} and before(accuracies()) is None
