"""Archive: the file has the documented layout, protects every byte, and follows no link to another file."""
import hashlib
import shutil

import h5py
import numpy as np
import pytest

from hpcfl.data import corpora, store
from hpcfl.errors import DataError
from tests.support.data_files import COUNT, SHAPE, draw_arrays, draw_content, read_everything, write_npz

pytestmark = pytest.mark.usefixtures("cache")


def test_the_file_has_the_documented_layout_and_sum(tmp_path):
    given = draw_arrays()
    with h5py.File(store.import_npz("own", write_npz(tmp_path))) as file:
        assert {name: (file[name].shape, str(file[name].dtype)) for name in ("train/images", "train/labels", "test/images", "test/labels")} == {
            "train/images": ((30, 3, 6, 5), "uint8"), "train/labels": ((30,), "int64"),
            "test/images": ((6, 3, 6, 5), "uint8"), "test/labels": ((6,), "int64")}
        content = b"".join(given[name].tobytes() for name in ("x_train", "y_train", "x_test", "y_test"))
        assert file.attrs["sha256"].decode() == hashlib.sha256(content).hexdigest()
        assert (file.attrs["name"], file.attrs["classes"]) == (b"own", 3) and {"source", "licence", "hpcfl_version"} <= set(file.attrs)


def write_stamp(path):
    """Pretend that the file as it is now has been verified: damage that leaves size and time as they were."""
    path.with_name(f".{path.stem}.verified").write_text(f"{path.stat().st_size} {path.stat().st_mtime_ns}")


def test_a_truncated_file_is_named(own):
    whole = own.read_bytes()
    for size in (0, 10, 500, len(whole) // 2, len(whole) - 1):
        own.write_bytes(whole[:size])
        write_stamp(own)
        with pytest.raises(DataError, match="own.h5"):
            read_everything()


@pytest.mark.parametrize("stamped", [False, True], ids=["as changed", "behind the stamp's back"])
def test_a_flipped_byte_anywhere_is_found_or_harmless(own, stamped):
    whole, given, generator, found = own.read_bytes(), read_everything(), np.random.default_rng(0), 0
    for at in generator.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(generator.integers(8))
        own.write_bytes(damaged)
        own.with_name(".own.verified").unlink(missing_ok=True)
        if stamped:
            write_stamp(own)
        try:
            assert all(np.array_equal(a, b) for a, b in zip(read_everything(), given, strict=True))
        except DataError as error:
            assert "own.h5" in str(error)
            found += 1
    assert found > 50                                              # the rest lies in padding


def test_the_file_protects_its_own_tables_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "cache"))
    few = {name: array[:4, :1, :2, :2] if name[0] == "x" else array[:4] for name, array in draw_content().items()}       # nearly all tables
    np.savez(tmp_path / "few.npz", **few)
    path = store.import_npz("few", tmp_path / "few.npz")
    whole, given = path.read_bytes(), read_everything("few")
    for at in range(0, len(whole), 17):
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        write_stamp(path)
        try:
            assert all(np.array_equal(a, b) for a, b in zip(read_everything("few"), given, strict=True)), f"byte {at} of {len(whole)}"
        except DataError as error:
            assert "few.h5" in str(error)


def rewrite(path, name, values, **settings):
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_dataset(name, data=values, **settings)
    write_stamp(path)


@pytest.mark.parametrize(("name", "values", "message"), [
    ("train/images", np.full((COUNT, *SHAPE), np.nan, dtype=np.float32), "train/images is float32"),
    ("train/images", np.zeros((COUNT, 16, 16), dtype=np.uint8), "shape .400, 16, 16."),
    ("train/labels", np.full(COUNT, np.nan), "train/labels is float64"),
    ("train/labels", np.zeros(COUNT - 1, dtype=np.int64), r"wanted int64 \(400,\)"),
    ("train/labels", np.full(COUNT, 5), r"wanted 0..4"),
    ("test/labels", np.full(50, -1), r"wanted 0..4"),
    ("test/images", np.zeros((50, 3, 8, 8), dtype=np.uint8), "wanted one size"),
])
def test_arrays_of_another_kind_are_refused(own, name, values, message):
    rewrite(own, name, values, chunks=values.shape)
    with pytest.raises(DataError, match=message) as caught:
        corpora.open_corpus("own")
    assert "own.h5" in str(caught.value)


@pytest.mark.parametrize("link", ["external", "soft", "storage", "virtual", "group"])
def test_links_to_other_files_are_refused_not_followed(own, link):
    elsewhere = own.with_name("elsewhere.h5")
    shutil.copy(own, elsewhere)
    with h5py.File(own, "r+") as file:
        if link == "group":
            del file["train"]
            file["train"] = h5py.ExternalLink("elsewhere.h5", "/train")
        else:
            file.move("train/images", "moved")
        if link == "external":
            file["train/images"] = h5py.ExternalLink("elsewhere.h5", "/train/images")
        if link == "soft":
            file["train/images"] = h5py.SoftLink("/moved")
        if link == "storage":
            file["train"].create_dataset("images", (COUNT, *SHAPE), np.uint8, external=[(str(elsewhere), 0, h5py.h5f.UNLIMITED)])
        if link == "virtual":
            layout = h5py.VirtualLayout((COUNT, *SHAPE), np.uint8)
            layout[:] = h5py.VirtualSource(elsewhere, "train/images", (COUNT, *SHAPE))
            file["train"].create_virtual_dataset("images", layout)
    write_stamp(own)
    with pytest.raises(DataError, match="not followed"):
        corpora.open_corpus("own")


def test_another_hdf5_file_is_not_taken_for_a_data_set(own):
    with h5py.File(own, "w") as file:
        file["numbers"] = np.arange(3)
    with pytest.raises(DataError, match="is not a data set of hpcfl"):
        corpora.open_corpus("own")
