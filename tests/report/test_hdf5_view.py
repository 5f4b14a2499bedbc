"""Descriptions of HDF5 files: what they hold, damaged files, and links that are named but never followed."""
import json
import os

import h5py
import numpy as np
import pytest

from hpcfl.errors import DataError, JobError
from hpcfl.report import hdf5_view


@pytest.fixture
def path(tmp_path):
    """A file with a group, numbers with NaN, compressed integers, strings and attributes."""
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file.attrs.update(schema=1, job="a = 1\nb = 2\n", long=np.arange(20))
        file["train/loss"] = [[1.0, np.nan], [3.0, np.inf]]
        file.create_dataset("images", data=np.arange(4096, dtype=np.uint16).reshape(64, 64), compression="gzip", chunks=(16, 64))
        file.create_dataset("phase", data=np.array(["one", "two"], object), dtype=h5py.string_dtype())
        file["images"].attrs["classes"] = np.int64(10)
    return tmp_path / "file.h5"


def test_datasets_have_shape_type_size_and_attributes(path):
    images = hdf5_view.describe(path)["members"]["images"]
    assert images["shape"] == [64, 64] and images["type"] == "uint16" and images["bytes"] == 8192 and images["stored_bytes"] < 8192
    assert images["compression"] == "gzip" and images["attributes"] == {"classes": 10}


def test_statistics_leave_out_what_is_not_finite_and_count_it(path):
    loss = hdf5_view.describe(path)["members"]["train"]["members"]["loss"]
    assert loss["statistics"] == {"min": 1.0, "mean": 2.0, "max": 3.0, "missing": 2}


def test_statistics_in_pieces_equal_those_of_the_whole(path, monkeypatch):
    monkeypatch.setattr(hdf5_view, "BLOCK_BYTES", 300)
    assert hdf5_view.describe(path)["members"]["images"]["statistics"] == {"min": 0, "mean": 2047.5, "max": 4095, "missing": 0}


def test_a_short_row_of_values_is_shown_whole(tmp_path):
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file["counts"], file["shares"], file["names"], file["long"] = np.arange(20), [0.5, np.nan], [b"class %d" % n for n in range(20)], np.arange(21)
    lines = hdf5_view.render(hdf5_view.describe(tmp_path / "file.h5")).splitlines()
    counts, long, names, shares = lines[1:]
    assert counts.endswith("0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19") and shares.endswith("0.5, nan")
    assert names.count("class") == 20 and long.endswith("min 0, mean 10, max 20")


def test_description_goes_into_strict_json(path):
    described = hdf5_view.describe(path)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert described["members"]["phase"]["first"] == ["one", "two"] and described["file_bytes"] == os.path.getsize(path)


def test_no_dataset_is_read_when_statistics_are_not_wanted(path):
    assert "statistics" not in hdf5_view.describe(path, summarise=False)["members"]["images"]


def test_empty_scalar_and_odd_datasets_are_described(tmp_path):
    with h5py.File(tmp_path / "odd.h5", "w") as file:
        file["scalar"], file["nothing"], file["empty"] = 3.0, np.zeros((0, 4)), h5py.Empty("f4")
        file["records"] = np.zeros(2, [("a", "i4"), ("b", "f8")])
        file["type"] = np.dtype("f4")
    members = hdf5_view.describe(tmp_path / "odd.h5")["members"]
    assert members["scalar"]["statistics"]["mean"] == 3.0 and "statistics" not in members["nothing"] and members["empty"]["shape"] is None
    assert "statistics" not in members["records"] and members["type"]["kind"] == "refused"
    assert "scalar" in hdf5_view.render(hdf5_view.describe(tmp_path / "odd.h5"))


def test_links_and_foreign_storage_are_named_but_not_followed(path, tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(range(16)))
    with h5py.File(path, "r+") as file:
        file["outside"] = h5py.ExternalLink("/elsewhere/secret.h5", "/key")
        file["inside"] = h5py.SoftLink("/images")
        file["train/again"] = file["train"]
        file.create_dataset("stored", shape=(16,), dtype="u1", external=[(str(tmp_path / "secret.bin"), 0, 16)])
        layout = h5py.VirtualLayout((2, 2), dtype="f8")
        layout[:] = h5py.VirtualSource("other.h5", "data", (2, 2))
        file.create_virtual_dataset("virtual", layout)
    members = hdf5_view.describe(path)["members"]
    assert members["outside"] == {"kind": "refused", "reason": "external link to /elsewhere/secret.h5:/key"}
    assert members["inside"]["reason"] == "soft link to /images" and "secret.bin" in members["stored"]["reason"]
    assert members["virtual"]["kind"] == "refused" and members["train"]["members"]["again"]["reason"] == "the same object as /train"
    assert "outside  -> external link to /elsewhere/secret.h5:/key; not followed" in hdf5_view.render(hdf5_view.describe(path))


def test_tree_shows_every_member_on_its_own_line(path):
    lines = hdf5_view.render(hdf5_view.describe(path)).splitlines()
    assert lines[0].startswith(str(path)) and any(line.startswith("└─ train/") for line in lines)
    assert any("(64 x 64)" in line and "uint16" in line and "min 0, mean 2048, max 4095" in line and "gzip" in line for line in lines)
    assert any("@job" in line and "text of 2 lines" in line for line in lines) and any("and 12 more" in line for line in lines)
    assert any('"one", "two"' in line for line in lines) and any("2 not finite" in line for line in lines)


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file["a\x1b[2Jb"] = [1]
        file.attrs["note\x07"] = "x\x1b]0;title"
    text = hdf5_view.render(hdf5_view.describe(tmp_path / "file.h5"))
    assert "\x1b" not in text and "\x07" not in text and r"a\x1b[2Jb" in text


def test_damaged_missing_and_foreign_files_are_refused_by_name(path, tmp_path):
    with pytest.raises(JobError, match="no such file"):
        hdf5_view.describe(tmp_path / "nowhere.h5")
    with pytest.raises(JobError, match="is a folder"):
        hdf5_view.describe(tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="file.h5.*truncated"):
        hdf5_view.describe(path)
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(DataError, match="text.h5"):
        hdf5_view.describe(tmp_path / "text.h5")
