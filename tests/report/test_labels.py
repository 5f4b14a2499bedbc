"""Labels: which runs differ only in seed, and names that tell groups apart."""
import json

import pytest

from hpcfl.report import labels, recording, summary
from tests.support.recorded_runs import altered, record


def test_same_seed_twice_is_not_averaged(tmp_path):
    runs = [summary.read(record(tmp_path / name)) for name in ("a", "b")]
    assert [len(group) for group in labels.group_by_seed(runs)] == [1, 1]


def test_a_label_is_the_method_and_what_differs_within_it_in_whole_words(tmp_path):
    def method(name: str, **data: object):
        told = "".join(f"\n{key} = {json.dumps(value)}" for key, value in data.items())
        def change(file):
            file.attrs["algorithm"] = name
            file.attrs["job"] = file.attrs["job"].replace("fedvtc", name).replace('name = "digits"', f'name = "digits"{told}')
        return change
    long = ["a_rather_long_name_of_a_model", "another_rather_long_name_of_a_model"]
    runs = [altered(tmp_path / str(number), method(*each[:1], **each[1])) for number, each in enumerate(
        (("fedvtc", {"alpha": 0.1}), ("fedvtc", {"alpha": 1.0}), ("fedavg", {"alpha": 1.0}), ("fedavg", {"alpha": 1.0, "names": long})))]
    found = list(labels.label_groups([recording.read(run) for run in runs]))
    assert found == ["fedvtc, alpha 0.1", "fedvtc, alpha 1.0", "fedavg, alpha 1.0", f"fedavg, alpha 1.0, names [{' '.join(long)}]"]
    assert list(labels.label_groups([recording.read(runs[0])])) == ["fedvtc"]


def test_only_runs_that_would_be_confused_get_longer_labels(tmp_path):
    runs = [summary.read(record(tmp_path / name, name=title, lr=lr)) for name, title, lr in
            (("a", "one", 0.1), ("b", "one", 0.2), ("c", "two", 0.1), ("d", "three", 0.3), ("e", "three", 0.3))]
    assert list(labels.label_groups(runs)) == ["fedvtc, lr 0.1, one", "fedvtc, lr 0.2", "fedvtc, lr 0.1, two", "fedvtc, lr 0.3, d", "fedvtc, lr 0.3, e"]


def of_data(digest: str | None):
    """A change to a record: its data set's name stood for data of this digest."""
    def change(file):
        if digest:
            file.attrs["data_sha256"] = digest
    return change


def test_runs_of_one_seed_group_saw_the_same_data(tmp_path):
    digests = ("1a" * 32, "1a" * 32, "2b" * 32, None)
    runs = []
    for seed, digest in enumerate(digests):
        def change(file, seed=seed, digest=digest):
            file.attrs["job"] = file.attrs["job"].replace("seed = 0", f"seed = {seed}")
            of_data(digest)(file)
        runs.append(recording.read(altered(tmp_path / str(seed), change)))
    groups = labels.label_groups(runs)
    assert {label: [run.seed for run in group] for label, group in groups.items()} == {
        "fedvtc, data 1a1a1a1a1a1a": [0, 1], "fedvtc, data 2b2b2b2b2b2b": [2], "fedvtc, data not noted": [3]}
    assert list(labels.label_groups(runs[:2])) == ["fedvtc"], "the same data need no word"


def test_a_digest_is_told_only_of_names_that_stood_for_several_data(tmp_path):
    def elsewhere(file):
        of_data("3c" * 32)(file)
        file.attrs["job"] = file.attrs["job"].replace('"digits"', '"other"')
    runs = [recording.read(altered(tmp_path / name, change)) for name, change in (("a", of_data("1a" * 32)), ("b", of_data("2b" * 32)), ("c", elsewhere))]
    assert list(labels.label_groups(runs)) == ["fedvtc, name digits, data 1a1a1a1a1a1a", "fedvtc, name digits, data 2b2b2b2b2b2b", "fedvtc, name other"]


@pytest.mark.parametrize(("value", "text"), [
    (True, "true"), (0.1, "0.1"), ("a b", "a b"), (["a", 1], "[a 1]"), ({"cnn1": 2, "cnn2": [1]}, "cnn1=2 cnn2=[1]"), ([], "[]")])
def test_values_are_written_as_a_job_has_them_without_quotes(value, text):
    assert labels._text(value) == text
