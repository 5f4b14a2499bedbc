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
from tests.support.data_files import COUNT, draw_content


def test_images_come_in_the_order_asked_for_with_repeats(own, monkeypatch):
    given, corpus, generator = draw_content(), corpora.open_corpus("own"), np.random.default_rng(1)
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


def test_a_cache_for_reading_only_works_and_stays_as_it_is(monkeypatch):
    base = Path(tempfile.mkdtemp())
    try:
        base.chmod(0o755)
        cache = base / "cache"
        monkeypatch.setenv("HPCFL_DATA", str(cache))
        np.savez(base / "own.npz", **draw_content())
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
        assert answers.get() == draw_content()["x_train"][7].tobytes() and answers.get() == "cached" and sorted(cache.iterdir()) == before
        cache.chmod(0o755)
    finally:
        shutil.rmtree(base)


def test_poisoned_test_labels_do_not_change_the_split(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path))
    splits = []
    for name, labels in (("clean", np.arange(50) % 5), ("poisoned", 4 - np.arange(50) % 5)):
        np.savez(tmp_path / f"{name}.npz", **draw_content() | {"y_test": labels})
        store.import_npz(name, tmp_path / f"{name}.npz")
        splits.append(partition.partition_samples(corpora.open_corpus(name).train_labels, 4, Data(partition="dirichlet", alpha=0.5, public_fraction=0.1), 0))
    for part in ("train", "validation", "test"):
        assert all(np.array_equal(a, b) for a, b in zip(getattr(splits[0], part), getattr(splits[1], part), strict=True))
    assert np.array_equal(splits[0].public, splits[1].public)
