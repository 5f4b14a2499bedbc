"""Corpora: data sets by name, read lazily, and every kind of damage found before it reaches a model."""
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcfl.data import archive, corpora, partition, store
from hpcfl.errors import DataError
from hpcfl.settings.sections import Data

COUNT, SHAPE = 400, (3, 16, 16)                                    # 42 images in a chunk, so ten chunks


def content(seed=0):
    generator = np.random.default_rng(seed)
    return {"x_train": generator.integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8), "y_train": np.arange(COUNT) % 5,
            "x_test": generator.integers(0, 256, (50, *SHAPE), dtype=np.uint8), "y_test": np.arange(50) % 5}


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A data set 'own' in a cache of its own."""
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "cache"))
    np.savez(tmp_path / "own.npz", **content())
    return store.import_npz("own", tmp_path / "own.npz")


def everything(name="own"):
    corpus = corpora.open_corpus(name)
    return corpus.train_images(), corpus.train_labels, corpus.test_images(), corpus.test_labels


def stamp(path):
    """Pretend that the file as it is now has been verified: damage that leaves size and time as they were."""
    path.with_name(f".{path.stem}.verified").write_text(f"{path.stat().st_size} {path.stat().st_mtime_ns}")


def test_digits_are_the_real_ones_split_evenly_over_the_classes():
    from sklearn.datasets import load_digits
    found, corpus = load_digits(), corpora.open_corpus("digits")
    assert (corpus.classes, corpus.shape) == (10, (1, 8, 8)) and (len(corpus.train_labels), len(corpus.test_labels)) == (1437, 360)
    share = np.bincount(corpus.test_labels) / np.bincount(found.target)
    assert np.abs(share - 0.2).max() < 0.005
    mine = sorted((int(y), x.tobytes()) for y, x in zip(np.concatenate([corpus.train_labels, corpus.test_labels]),
                                                         np.concatenate([corpus.train_images(), corpus.test_images()]), strict=True))
    theirs = sorted((int(y), np.rint(x * 255 / 16).astype(np.uint8).tobytes()) for y, x in zip(found.target, found.images, strict=True))
    assert mine == theirs and corpus.train_images().max() == 255


@pytest.mark.parametrize("name", ["digits", "random"])
def test_embedded_sets_are_the_same_every_time_and_need_no_cache(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "none"))
    one, other = corpora.open_corpus(name), corpora.open_corpus(name)
    assert one.sha256 == other.sha256 and np.array_equal(one.train_images(), other.train_images()) and not (tmp_path / "none").exists()


def test_random_has_the_shape_of_the_benchmark():
    corpus = corpora.open_corpus("random")
    assert (corpus.shape, corpus.classes) == ((3, 32, 32), 10) and np.bincount(corpus.train_labels).tolist() == [100] * 10


def test_images_come_in_the_order_asked_for_with_repeats(own, monkeypatch):
    given, corpus, generator = content(), corpora.open_corpus("own"), np.random.default_rng(1)
    for indices in ([399, 0, 7, 7, 0], [], range(COUNT), generator.integers(0, COUNT, 1000), generator.permutation(COUNT)[:17], [41, 42, 43, 398]):
        indices = np.array(list(indices), dtype=np.int64)
        assert np.array_equal(corpus.train_images(indices), given["x_train"][indices])
    monkeypatch.setattr(archive, "READ_BYTES", 1)                  # one chunk at a time
    monkeypatch.setattr(archive, "GAP_CHUNKS", 0)
    assert np.array_equal(corpus.train_images(np.arange(COUNT)[::-1]), given["x_train"][::-1])
    assert np.array_equal(corpus.test_images(np.array([3, 1])), given["x_test"][[3, 1]])


@pytest.mark.parametrize("bad", [[-1], [0, COUNT]])
def test_an_index_outside_the_set_is_not_wrapped_around(own, bad):
    with pytest.raises(IndexError, match="reach outside the 400 images"):
        corpora.open_corpus("own").train_images(np.array(bad))


def test_a_set_that_is_not_there_comes_with_the_command_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"hpcfl data get cifar10 \[--from DIR\]"):
        corpora.open_corpus("cifar10")
    with pytest.raises(DataError, match="did you mean 'cifar100'.*hpcfl data import cifar1000 --npz FILE"):
        corpora.open_corpus("cifar1000")


def test_a_truncated_file_is_named(own):
    whole = own.read_bytes()
    for size in (0, 10, 500, len(whole) // 2, len(whole) - 1):
        own.write_bytes(whole[:size])
        stamp(own)
        with pytest.raises(DataError, match="own.h5"):
            everything()


@pytest.mark.parametrize("stamped", [False, True], ids=["as changed", "behind the stamp's back"])
def test_a_flipped_byte_anywhere_is_found_or_harmless(own, stamped):
    whole, given, generator, found = own.read_bytes(), everything(), np.random.default_rng(0), 0
    for at in generator.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(generator.integers(8))
        own.write_bytes(damaged)
        own.with_name(".own.verified").unlink(missing_ok=True)
        if stamped:
            stamp(own)
        try:
            assert all(np.array_equal(a, b) for a, b in zip(everything(), given, strict=True))
        except DataError as error:
            assert "own.h5" in str(error)
            found += 1
    assert found > 50                                              # the rest lies in padding


def test_the_file_protects_its_own_tables_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "cache"))
    few = {name: array[:4, :1, :2, :2] if name[0] == "x" else array[:4] for name, array in content().items()}       # nearly all tables
    np.savez(tmp_path / "few.npz", **few)
    path = store.import_npz("few", tmp_path / "few.npz")
    whole, given = path.read_bytes(), everything("few")
    for at in range(0, len(whole), 17):
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        stamp(path)
        try:
            assert all(np.array_equal(a, b) for a, b in zip(everything("few"), given, strict=True)), f"byte {at} of {len(whole)}"
        except DataError as error:
            assert "few.h5" in str(error)


def test_pixels_changed_by_another_program_are_found_when_the_set_is_opened(own):
    with h5py.File(own, "r+") as file:                             # HDF5 renews its own checksums: only the SHA-256 can tell
        file["train/images"][5] = 0
    with pytest.raises(DataError, match="own.h5.*SHA-256"):
        corpora.open_corpus("own")


def test_contents_are_compared_once_and_again_after_a_change(own, monkeypatch):
    compared, verify = [], archive.verify
    monkeypatch.setattr(archive, "verify", lambda path: (compared.append(path), verify(path)))
    corpora.open_corpus("own")
    corpora.open_corpus("own")
    assert compared == []                                          # importing did it
    os.utime(own)
    corpora.open_corpus("own")
    corpora.open_corpus("own")
    assert compared == [own]


def rewrite(path, name, values, **settings):
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_dataset(name, data=values, **settings)
    stamp(path)


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
    stamp(own)
    with pytest.raises(DataError, match="not followed"):
        corpora.open_corpus("own")


def test_another_hdf5_file_is_not_taken_for_a_data_set(own):
    with h5py.File(own, "w") as file:
        file["numbers"] = np.arange(3)
    with pytest.raises(DataError, match="is not a data set of hpcfl"):
        corpora.open_corpus("own")


def test_a_cache_for_reading_only_works_and_stays_as_it_is(monkeypatch):
    base = Path(tempfile.mkdtemp())
    try:
        base.chmod(0o755)
        cache = base / "cache"
        monkeypatch.setenv("HPCFL_DATA", str(cache))
        np.savez(base / "own.npz", **content())
        path = store.import_npz("own", base / "own.npz")
        path.with_name(".own.verified").unlink()                   # the costly case: every opening compares all bytes
        path.chmod(0o444)
        cache.chmod(0o555)
        before = sorted(cache.iterdir())
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()

        def run():
            if os.getuid() == 0:
                os.setuid(65534)                                   # root may write anywhere
            try:
                (cache / "probe").touch()
            except PermissionError:
                answers.put(corpora.open_corpus("own").train_images(np.array([7])).tobytes())
            answers.put(store.list_data_sets()[2]["status"])
        process = context.Process(target=run)
        process.start()
        process.join(30)
        assert process.exitcode == 0
        assert answers.get() == content()["x_train"][7].tobytes() and answers.get() == "cached" and sorted(cache.iterdir()) == before
        cache.chmod(0o755)
    finally:
        shutil.rmtree(base)


def test_poisoned_test_labels_do_not_change_the_split(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path))
    splits = []
    for name, labels in (("clean", np.arange(50) % 5), ("poisoned", 4 - np.arange(50) % 5)):
        np.savez(tmp_path / f"{name}.npz", **content() | {"y_test": labels})
        store.import_npz(name, tmp_path / f"{name}.npz")
        splits.append(partition.partition_samples(corpora.open_corpus(name).train_labels, 4, Data(partition="dirichlet", alpha=0.5, public_fraction=0.1), 0))
    for part in ("train", "validation", "test"):
        assert all(np.array_equal(a, b) for a, b in zip(getattr(splits[0], part), getattr(splits[1], part), strict=True))
    assert np.array_equal(splits[0].public, splits[1].public)
