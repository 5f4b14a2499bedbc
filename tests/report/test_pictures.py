"""Pictures: a run has those that it has data for, each with words for who cannot see it, and all of them can be drawn."""
import numpy as np
import pytest

from hpcfl.report import canvas, pictures
from hpcfl.report.recording import read
from tests.support.recorded_runs import altered, compressing, record, three_ways

ALWAYS = ["accuracy", "clients", "recall", "training", "bytes", "seconds", "partition", "samples"]


def without(*names: str):
    """A change to a record that leaves out groups or datasets."""
    def change(file):
        for name in names:
            del file[name]
    return change


def of_another_kind(file) -> None:
    """Seconds of a kind that has no place of its own in the stack."""
    file["seconds/thinking"] = [[0.5, 0.5], [0.5, 0.5]]


RUNS = {                                                           # how a run is made, and the pictures that it has
    "whole": (record, ALWAYS),
    "compressing": (lambda folder: altered(folder, compressing(3)), [*ALWAYS[:4], "server", "negatives", *ALWAYS[4:]]),
    "of many layers": (lambda folder: altered(folder, compressing(11)), [*ALWAYS[:4], "server", "negatives", *ALWAYS[4:]]),
    "in phases": (three_ways, ["accuracy", "clients", "recall"]),
    "never evaluated": (lambda folder: altered(folder, without("evaluation")), ["training", "bytes", "seconds", "partition", "samples"]),
    "without samples and seconds": (lambda folder: altered(folder, without("samples", "seconds", "partition")), ALWAYS[:5]),
    "of nothing but rounds": (lambda folder: altered(folder, without("evaluation", "samples", "seconds", "partition", "train", "bytes")), []),
    "of another kind of seconds": (lambda folder: altered(folder, of_another_kind), ALWAYS)}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_has_the_pictures_that_it_has_data_for_and_each_can_be_drawn(tmp_path, kind):
    make, names = RUNS[kind]
    found = pictures.picture_run(read(make(tmp_path / "run")), "01-")
    assert [picture.name for picture in found] == [f"01-{name}" for name in names]
    for picture in found:
        assert picture.title and picture.alt.endswith(".") and "nan" not in picture.alt
        picture.draw(canvas.DARK).canvas.draw()


def test_the_words_say_what_the_picture_shows(tmp_path):
    words = {picture.name: picture.alt for picture in pictures.picture_run(read(record(tmp_path / "run")))}
    assert words["accuracy"] == "Accuracy of 2 clients over 2 rounds: mean 25.0 % at the first evaluation and 50.0 % at the last, " \
                                "clients then between 50.0 % and 50.0 %."
    assert words["clients"] == "Clients before and after fine-tuning, last evaluation. before fine-tuning: mean 30.0 %; after fine-tuning: mean 50.0 %."
    assert words["recall"].endswith("On average the best class is 2 with 55.0 %, the worst 1 with 40.0 %.")
    assert words["training"] == "Training per round, mean over clients: loss from 2.000 to 1.250; kl from 0.500 to 0.275."
    assert words["bytes"] == "Bytes per round. Totals: simulated up 250 B, simulated down 40 B, transported between ranks 20 B."
    assert words["seconds"] == "Time of each rank by phase, all rounds. Over all ranks: train 7 s; combine 5 s; idle 3 s."
    assert words["partition"].endswith("80 in all, clients hold 40 to 40, and 1.5 of 3 classes on average.")
    assert words["samples"].endswith("beside them synthetic, client 0; 2 of 3 classes have synthetic images.")


def test_a_run_of_one_round_without_a_mean_says_only_what_it_is(tmp_path):
    def nobody(file):
        file["evaluation/generalization_correct"][3] = -1
    words = {picture.name: picture.alt for picture in pictures.picture_run(read(altered(tmp_path / "run", nobody)))}
    assert words["accuracy"] == "Accuracy per round."


def test_runs_are_laid_over_each_other_by_rounds_and_by_bytes(tmp_path):
    runs = {"a": [read(record(tmp_path / "a")), read(record(tmp_path / "b", seed=1))], "c": [read(record(tmp_path / "c", lr=0.2))]}
    rounds, spent = pictures.compare_runs(runs)
    assert (rounds.name, spent.name) == ("clients-rounds", "clients-bytes") and rounds.alt.endswith("At the end: a 50.0 %; c 50.0 %.")
    for picture in (rounds, spent):
        picture.draw(canvas.LIGHT).canvas.draw()
    assert pictures._curve(runs["c"][0], "generalization")[1].tolist() == [120, 290]
    nothing, _ = pictures.compare_runs({"d": [read(altered(tmp_path / "d", without("evaluation")))]})
    assert nothing.alt.endswith("Nothing was evaluated yet.") and nothing.draw(canvas.LIGHT)


def test_clients_are_named_after_their_architectures_where_these_differ(tmp_path):
    def same(file):
        file["clients/architecture"][...] = np.array(["cnn1", "cnn1"], object)
    assert pictures._labels(read(record(tmp_path / "mixed"))) == ["0 cnn1", "1 mlp<b>"]
    assert pictures._labels(read(altered(tmp_path / "alike", same))) == ["client 0", "client 1"]
