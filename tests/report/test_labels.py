"""Labels: which runs differ only in seed, and names that tell groups apart."""
import json

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
