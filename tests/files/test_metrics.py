"""The record on disk: rows are added without touching what is there, every damage is found, and files of an earlier version are read."""
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcfl.errors import CheckpointError
from hpcfl.files import metrics
from hpcfl.report import summary
from hpcfl.runs.record import Record
from tests.runs.test_record import CLIENTS, account, contents, empty, table

JOB = {"algorithm": "none", "name": "nöne", "job": "[run]\nname = 'nöne'\n", "clients": CLIENTS, "classes": 2, "ranks": 2}
COUNTS = {"evaluation/generalization_count": np.array([9, 300]), "evaluation/personal_count": np.full((CLIENTS, 2), 4)}


def fresh() -> Record:
    record = empty()
    record.attributes, record.fixed = dict(JOB), record.fixed | COUNTS
    return record


def carry_on(record: Record, rounds: int) -> None:
    """So many rounds, in which metrics, kinds of evaluation, notes and models of the federation come and go."""
    for round_ in range(len(record.rows), len(record.rows) + rounds):
        if round_ % 2 == 0:
            kinds = {"generalization_correct": np.full((CLIENTS, 2), round_)} | ({"personal_correct": np.full((CLIENTS, 2), 3)} if round_ % 4 else {})
            record.evaluate("end", kinds, {f"model {round_ % 3}": np.array([round_, 200])})
        more = {"kl": 2.0} if round_ % 3 == 0 else {}
        record.finish_round("rounds", round_, [account(0, [0, 2], opened_s=10.0 * round_, loss=0.5), account(1, [1], loss=0.25, **more)])


def written(folder: Path, checkpoints: Mapping[int, int]) -> Path:
    """A record brought to the disk at checkpoints: rounds before each of them, by number."""
    folder.mkdir(parents=True)
    record = fresh()
    for rounds in checkpoints.values():
        carry_on(record, rounds)
        record.append(folder / "metrics.h5")
    return folder / "metrics.h5"


@pytest.fixture
def apart(monkeypatch):
    """Every checkpoint after the first adds a file of its own, however small."""
    monkeypatch.setattr(metrics, "SMALL_BYTES", 0)
    monkeypatch.setattr(metrics, "SHARE", 0.001)


def whole(folder: Path, rounds: int) -> dict[str, list]:
    record = fresh()
    carry_on(record, rounds)
    folder.mkdir(exist_ok=True)
    record.write(folder / "whole.h5")
    return contents(folder / "whole.h5")


def as_read(path: Path, rows: int, folder: Path) -> dict[str, list]:
    """What a run that goes on from there would write."""
    record = fresh()
    assert record.read(path, rows) == [] and record.lost == []
    folder.mkdir(exist_ok=True)
    record.write(folder / "read.h5")
    return contents(folder / "read.h5")


def test_rows_are_added_in_a_file_of_their_own_and_the_others_are_not_touched(apart, tmp_path):
    record = fresh()
    (tmp_path / "run").mkdir()
    path, seen = tmp_path / "run" / "metrics.h5", {}
    for rounds in (3, 2, 4):
        carry_on(record, rounds)
        record.append(path)
        files = {each: (each.read_bytes(), each.stat().st_mtime_ns) for each in (path, *metrics.find_beside(path))}
        assert len(files) == len(seen) + 1 and seen.items() <= files.items()
        seen = files
    record.append(path)
    assert [each.name for each in metrics.find_beside(path)] == ["rows-000003.h5", "rows-000005.h5"], "nothing new is no file"
    record.write(path)
    assert contents(path) == whole(tmp_path / "other", 9) and metrics.find_beside(path) == []


def test_a_record_in_pieces_reads_as_the_one_file(apart, tmp_path):
    path = written(tmp_path / "run", {1: 3, 2: 2, 3: 1, 4: 5})
    for rows in (11, 6, 5, 4, 3, 2):
        assert as_read(path, rows, tmp_path / "read") == whole(tmp_path / "whole", rows)
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "read" / "read.h5", tmp_path / "one" / "metrics.h5")
    whole(tmp_path / "one", 11)
    (tmp_path / "one" / "whole.h5").replace(tmp_path / "one" / "metrics.h5")
    pieces, one = summary.summarise(path.parent), summary.summarise(tmp_path / "one")
    assert {**pieces, "run": ""} == {**one, "run": ""}
    read, other = (summary.read(folder).arrays for folder in (path.parent, tmp_path / "one"))
    assert read.keys() == other.keys() and read["evaluation/global_correct"].tolist() == other["evaluation/global_correct"].tolist()


def test_a_small_record_is_one_file_at_any_time_and_a_large_one_nearly(tmp_path, monkeypatch):
    path = written(tmp_path / "small", dict.fromkeys(range(4), 1))
    assert metrics.find_beside(path) == [] and len(table(path, "rounds/round")) == 4
    monkeypatch.setattr(metrics, "SMALL_BYTES", 0)
    record, path, most = fresh(), tmp_path / "large.h5", 0
    carry_on(record, 300)
    for _ in range(12):
        carry_on(record, 1)
        record.append(path)
        tail = sum(each.stat().st_size for each in metrics.find_beside(path))
        most = max(most, len(metrics.find_beside(path)))
        assert tail <= path.stat().st_size / metrics.SHARE + 60_000
    assert most >= 1


def test_a_file_that_was_made_and_the_others_not_removed_counts_alone(apart, tmp_path, monkeypatch):
    """Killed between a new metrics.h5 and the removal of what became part of it."""
    record, path = fresh(), tmp_path / "run" / "metrics.h5"
    path.parent.mkdir()
    for rounds in (3, 2, 4):
        carry_on(record, rounds)
        record.append(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        record.write(path)
    assert len(metrics.find_beside(path)) == 2 and as_read(path, 9, tmp_path / "read") == whole(tmp_path / "whole", 9)
    other = fresh()
    carry_on(other, 3)
    (path.parent / "metrics.h5").unlink()
    other.write(tmp_path / "three.h5")
    (tmp_path / "three.h5").replace(path)
    assert len(metrics.read(path)[1]["rounds/phase"]) == 3, "rows of a future that was given up"


@pytest.mark.parametrize("step", ["write", "replace", "sync"])
def test_a_checkpoint_that_fails_anywhere_leaves_all_rows_of_the_one_before(step, apart, tmp_path, monkeypatch):
    from hpcfl.files import atomic, draft

    def fail(*arguments):
        raise OSError(28, "No space left on device")
    record, path = fresh(), tmp_path / "run" / "metrics.h5"
    path.parent.mkdir()
    for rounds in (3, 2):
        carry_on(record, rounds)
        record.append(path)
    carry_on(record, 4)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="rows-000005.h5: could not be written: No space left on device"):
        patch.setattr(*{"write": (draft.os, "pwrite"), "replace": (atomic.os, "replace"), "sync": (atomic, "sync")}[step], fail)
        record.append(path)
    assert as_read(path, 5, tmp_path / "read") == whole(tmp_path / "whole", 5) and [each.name for each in metrics.find_beside(path)] == ["rows-000003.h5"]
    record.append(path)
    assert as_read(path, 9, tmp_path / "read") == whole(tmp_path / "whole", 9)


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone", "of other clients", "no record"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_the_other_files_hold_is_kept_when_one_is_damaged(which, damage, apart, tmp_path):
    path = written(tmp_path / "run", {1: 3, 2: 2, 3: 4})
    file, rows = (path, *metrics.find_beside(path))[which], (range(3), range(3, 5), range(5, 9))[which]
    content = file.read_bytes()
    file.unlink()
    if damage == "of other clients":
        Record(JOB, {"clients/rank": np.zeros(2, int)}, 2, 1).write(tmp_path / "other.h5")
        (tmp_path / "other.h5").replace(file)
        with h5py.File(file, "r+") as opened, h5py.File(metrics.find_beside(path)[0] if which == 0 else path) as rest:
            opened.attrs.update(series=rest.attrs["series"], first_row=rows[0])
    elif damage == "no record":
        with h5py.File(file, "w") as opened:
            opened["numbers"] = np.arange(3)
    elif damage != "gone":
        file.write_bytes(content[:len(content) // 2] if damage == "cut" else b"")
    record = fresh()
    damaged = record.read(path, 9, [("rounds", row) for row in range(9)])
    assert record.lost == list(rows) and [each.path for each in damaged] == ([file] if damage != "gone" or which == 0 else [])
    record.write(tmp_path / "kept.h5")
    assert table(tmp_path / "kept.h5", "rounds/round").tolist() == list(range(9))
    known = (table(tmp_path / "kept.h5", "bytes/simulated_up") > 0).all(1)
    assert np.flatnonzero(~known).tolist() == list(rows)


def test_a_damaged_file_gets_a_name_that_no_other_has(tmp_path):
    for expected in ("metrics.h5.damaged", "metrics.h5.damaged-1", "metrics.h5.damaged-2"):
        (tmp_path / "metrics.h5").write_text(expected)
        assert metrics.set_aside(tmp_path / "metrics.h5").name == expected and (tmp_path / expected).read_text() == expected
    assert metrics.set_aside(tmp_path / "metrics.h5") is None


def test_no_flipped_bit_changes_a_figure_in_silence(tmp_path):
    """Where HDF5 keeps nothing, a bit may be turned and nothing is read otherwise."""
    draw, path = random.Random(0), written(tmp_path / "run", {1: 6})
    clean, content, found = summary.summarise(path.parent), path.read_bytes(), 0
    for _ in range(250):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert summary.summarise(path.parent) == clean
        except CheckpointError:
            found += 1
    assert found > 100


def test_counts_take_as_many_bytes_as_they_need_and_are_packed_and_checked(tmp_path):
    path = written(tmp_path / "run", {1: 40})
    with h5py.File(path) as file:
        kinds = {name: str(file[name].dtype) for name in ("rounds/round", "bytes/simulated_up", "bytes/transported", "evaluation/generalization_correct",
                                                          "evaluation/personal_correct", "evaluation/generalization_count", "trace/rank")}
        assert kinds == {"rounds/round": "uint8", "bytes/simulated_up": "uint8", "bytes/transported": "uint16", "evaluation/generalization_correct": "uint8",
                         "evaluation/personal_correct": "int8", "evaluation/generalization_count": "uint16", "trace/rank": "uint8"}
        datasets = []
        file.visititems(lambda name, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        assert all(item.fletcher32 and item.compression == "gzip" for item in datasets if item.size)
        assert not [item.name for item in datasets if (kind := h5py.check_string_dtype(item.dtype)) and kind.length is None], "a heap has no checksums"
        assert file.attrs["name"].decode() == "nöne" and file["rounds/phase"].asstr()[0] == "rounds"
    arrays = metrics.read(path)[1]
    assert {array.dtype for name, array in arrays.items() if array.dtype.kind in "iu"} == {np.dtype(np.int64)}, "sums of small integers would overflow"


def test_a_long_job_and_names_of_every_script_are_attributes_too(tmp_path):
    record = fresh()
    record.attributes["job"] = "# größer\n" * 20_000
    record.write(tmp_path / "metrics.h5")
    assert metrics.read(tmp_path / "metrics.h5")[0]["job"] == record.attributes["job"]


def in_the_first_layout(record: Record, path: Path) -> None:
    """A metrics.h5 as it was written before it had checksums, small integers and files beside it."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"schema": 1, **record.attributes})
        for name, column in (record.fixed | record._build_columns(0)).items():
            file[name] = np.array(column, h5py.string_dtype()) if column.dtype == object else column


def test_a_record_in_the_first_layout_is_read_and_goes_on(apart, tmp_path):
    path, record = tmp_path / "run" / "metrics.h5", fresh()
    path.parent.mkdir()
    carry_on(record, 5)
    in_the_first_layout(record, path)
    assert as_read(path, 4, tmp_path / "read") == whole(tmp_path / "whole", 4)
    assert summary.summarise(path.parent)["rounds"] == 5
    resumed = fresh()
    resumed.read(path, 4)
    carry_on(resumed, 2)
    resumed.append(path)
    carry_on(resumed, 1)
    resumed.append(path)
    assert len(metrics.find_beside(path)) == 1 and len(metrics.read(path)[1]["rounds/phase"]) == 7
