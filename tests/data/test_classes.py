"""Classes: every label becomes a number from 0, every class has a name and a count, and what makes an accuracy mean little is said."""
import h5py
import numpy as np
import pytest
from PIL import Image

from hpcfl import cli
from hpcfl.data import archive, classes, corpora, store
from hpcfl.errors import DataError
from hpcfl.report import hdf5_view, page, summary
from hpcfl.report.recording import read
from tests.support.tiny_runs import carry_out, tiny, write_job


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def imported(folder, train, test, name="own"):
    """A data set with these labels, in the cache."""
    draw = np.random.default_rng(0)
    images = {f"x_{part}": draw.integers(0, 256, (len(labels), 1, 8, 8), dtype=np.uint8) for part, labels in (("train", train), ("test", test))}
    np.savez(folder / f"{name}.npz", **images, y_train=train, y_test=test)
    return store.import_npz(name, folder / f"{name}.npz")


def as_an_earlier_hpcfl_wrote_it(path, lowest=0):
    """The file without what tells of its classes, which the lowest label was no matter for."""
    with h5py.File(path, "r+", libver="v110") as file:
        del file["classes"], file.attrs["notes"]
        file.attrs["classes"] = int(file.attrs["classes"]) + lowest
        for part in archive.PARTS:
            file[f"{part}/labels"][:] += lowest
    return path


def hpcfl(capsys, *arguments):
    """(exit code, output) of a command."""
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments)])
    told = capsys.readouterr()
    return end.value.code, told.out + told.err


@pytest.mark.parametrize("values", [(1, 2, 3, 4), (0, 10, 20, 30), (7, 8, 9, 10**18), (0, 1, 2, 2**64 - 1)])
def test_labels_with_gaps_are_numbered_anew_and_stay_as_names(tmp_path, values):
    given = np.array(values, dtype=np.uint64 if max(values) > 2**63 else np.int64)
    path = imported(tmp_path, given[np.arange(40) % 4], given[np.arange(8) % 4])
    corpus, header = corpora.open_corpus("own"), archive.read_header(path)
    assert corpus.classes == 4 and corpus.train_labels.tolist() == [0, 1, 2, 3] * 10 and corpus.test_labels.tolist() == [0, 1, 2, 3] * 2
    assert header.names == tuple(map(str, values)) and header.counts == {"train": (10,) * 4, "test": (2,) * 4}
    note = f"labels {', '.join(map(str, values))} became the numbers 0 to 3, in this order; the classes keep their labels as names"
    assert header.notes == (note,) and corpus.remarks == (note,)


def test_labels_from_zero_without_gaps_stay_and_need_no_word(tmp_path):
    imported(tmp_path, np.arange(40) % 4, np.arange(8) % 4)
    corpus = corpora.open_corpus("own")
    assert corpus.train_labels.tolist() == [0, 1, 2, 3] * 10 and corpus.remarks == ()


@pytest.mark.parametrize("absent", [4, 99, -1])
def test_a_class_that_only_the_test_part_has_is_refused(tmp_path, cache, absent):
    with pytest.raises(DataError, match=f"1 test image of class {absent}, which has no training images .those are of class 0, 1, 2, 3.; leave them out of"):
        imported(tmp_path, np.arange(40) % 4, np.array([0, 1, absent]))
    assert not list(cache.glob("*.h5"))


def test_names_and_counts_are_in_the_file_and_in_what_lists_it(tmp_path, capsys):
    path = imported(tmp_path, np.array([1] * 5 + [2] * 3), np.array([1, 2, 2]))
    row = next(row for row in store.list_data_sets() if row["name"] == "own")
    assert row["names"] == ["1", "2"] and row["counts"] == {"train": [5, 3], "test": [1, 2]}
    described = hdf5_view.describe(path)["members"]["classes"]["members"]
    assert described["names"]["first"] == ["1", "2"] and described["train"]["values"] == [5, 3] and described["test"]["values"] == [1, 2]
    code, listed = hpcfl(capsys, "data", "list")
    assert code == 0 and "1, 2; 3 to 5 training images each" in listed
    code, shown = hpcfl(capsys, "inspect", path)
    assert code == 0 and '"1", "2"' in shown and "5, 3" in shown


def test_an_import_says_what_it_holds(tmp_path, capsys):
    imported(tmp_path, np.array([1] * 5 + [2] * 3), np.array([1, 2, 2]), "first")
    code, told = hpcfl(capsys, "data", "import", "own", "--npz", tmp_path / "first.npz")
    heading, columns, *lines = told.splitlines()
    assert code == 0 and columns.split() == ["class", "train", "test"] and [line.split() for line in lines[:2]] == [["1", "5", "1"], ["2", "3", "2"]]
    assert heading.startswith("own: 8 training and 3 test images of 1 x 8 x 8 (channels x height x width), uint8 from 0 to 255, from ")
    assert lines[2:] == ["note: labels 1, 2 became the numbers 0 to 1, in this order; the classes keep their labels as names",
                         str(tmp_path / "cache" / "own.h5")]


def test_many_classes_are_told_in_few_lines(tmp_path):
    lines = store.describe_file(imported(tmp_path, np.arange(300) % 100, np.arange(100))).splitlines()
    assert len(lines) == 23 and lines[-1] == "  and 80 more, with 3 training and 1 test images each"


def test_one_class_is_said_at_the_import_at_a_dry_run_and_when_a_run_starts(tmp_path, capsys):
    imported(tmp_path, np.zeros(60, dtype=int), np.zeros(10, dtype=int), "first")
    said = "all images are of one class, '0': the accuracy of every model is 100"
    assert f"note: {said}" in hpcfl(capsys, "data", "import", "own", "--npz", tmp_path / "first.npz")[1]
    job = tiny("standalone", data={"name": "own", "fraction": 1.0, "partition": "iid", "minimum": 1}, federation={"rounds": 1})
    code, told = hpcfl(capsys, "run", write_job(tmp_path, job), "--dry-run")
    assert code == 0 and f"# own: {said}" in told
    folder = carry_out(job, tmp_path / "run")
    assert f"own: {said}" in (folder / "log" / "rank-0000.log").read_text(encoding="utf-8")


def test_what_was_left_out_at_the_import_is_said_when_a_run_starts(tmp_path, capsys):
    path = imported(tmp_path, np.arange(60) % 2 + 1, np.arange(10) % 2 + 1)
    folder = carry_out(tiny("standalone", data={"name": "own", "fraction": 1.0, "partition": "iid", "minimum": 1}, federation={"rounds": 1}), tmp_path / "run")
    assert f"own: {archive.read_header(path).notes[0]}" in (folder / "log" / "rank-0000.log").read_text(encoding="utf-8")


def test_a_file_of_an_earlier_hpcfl_is_read_with_numbers_for_names(tmp_path):
    before = corpora.open_corpus("own") if imported(tmp_path, np.arange(40) % 4, np.arange(8) % 4) else None
    path = as_an_earlier_hpcfl_wrote_it(store.find_path("own"))
    corpus = corpora.open_corpus("own")
    assert corpus.sha256 == before.sha256 and np.array_equal(corpus.train_images(), before.train_images()) and corpus.remarks == ()
    assert archive.read_header(path).names == ("0", "1", "2", "3") and store.import_npz("own", tmp_path / "own.npz") == path


def test_gaps_that_an_earlier_hpcfl_took_for_classes_are_said_with_the_way_out(tmp_path, monkeypatch):
    path = as_an_earlier_hpcfl_wrote_it(imported(tmp_path, np.arange(40) % 4 + 1, np.arange(8) % 4 + 1), lowest=1)
    monkeypatch.setattr(archive, "verify", lambda path: None)      # its sum was of these labels
    (said,) = corpora.open_corpus("own").remarks
    assert said.startswith("class 0 has no training images") and "delete the data set's file in the cache and import it again" in said
    assert archive.read_header(path).classes == 5


def test_a_class_without_test_images_is_said(tmp_path):
    imported(tmp_path, np.arange(40) % 4, np.array([0, 1]))
    assert corpora.open_corpus("own").remarks == ("classes 2, 3 have no test images, so that accuracies say nothing of them",)


@pytest.mark.parametrize("names", [np.array([b"a", b"b"]), np.arange(4)])
def test_names_that_do_not_fit_the_classes_are_refused(tmp_path, names):
    path = imported(tmp_path, np.arange(40) % 4, np.arange(8) % 4)
    with h5py.File(path, "r+") as file:
        del file["classes/names"]
        file["classes/names"] = names
    with pytest.raises(DataError, match="own.h5: classes/names is .*; wanted text .4,."):
        corpora.open_corpus("own")


def test_long_lists_are_cut_in_the_middle():
    assert classes.list_text([1, 2]) == "1, 2" and classes.list_text(range(100)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ... 99 (100 in all)"


def test_a_class_whose_name_would_steer_the_terminal_is_shown_escaped(tmp_path, capsys):
    for part in ("train", "test"):
        for name in ("cat", "do\x1b[2Jg"):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            Image.new("L", (8, 8), 9).save(tmp_path / "pictures" / part / name / "0.png")
    for command in (["data", "import", "own", "--folder", tmp_path / "pictures"], ["data", "list"]):
        code, told = hpcfl(capsys, *command)
        assert code == 0 and "\x1b" not in told and r"do\x1b[2Jg" in told


def test_a_report_says_which_data_the_name_stood_for(tmp_path):
    path = imported(tmp_path, np.arange(60) % 2, np.arange(10) % 2)
    folder = carry_out(tiny("standalone", data={"name": "own", "fraction": 1.0, "partition": "iid", "minimum": 1}, federation={"rounds": 1}), tmp_path / "run")
    found, header = summary.summarise(folder), archive.read_header(path)
    assert (found["data"], found["data_source"], found["data_sha256"]) == ("own", str(tmp_path / "own.npz"), header.sha256)
    recording = read(folder)
    assert f"standalone on own ({tmp_path / 'own.npz'}, SHA-256 {header.sha256[:12]}), 5 clients" in \
        page._headline(page.Run(1, "standalone", recording, found), False)
    with h5py.File(folder / "metrics.h5", "r+") as file:           # as an earlier hpcfl wrote it
        del file.attrs["data_source"]
    assert "standalone on own, 5 clients" in page._headline(page.Run(1, "standalone", recording, summary.summarise(folder)), False)
