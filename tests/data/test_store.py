"""Store: conversion into the cache, once and whole or not at all, and what is refused on the way."""
import hashlib
import multiprocessing
import os
import resource

import numpy as np
import pytest

from hpcfl.data import archive, corpora, sources, store
from hpcfl.errors import DataError
from hpcfl.files.atomic import replacing
from tests.support.data_files import draw_arrays, draw_pictures, list_left, write_folder, write_npz, write_tiny_zip

pytestmark = pytest.mark.usefixtures("cache")


def test_an_npz_comes_back_as_it_went_in(tmp_path, cache):
    given = draw_arrays()
    path = store.import_npz("own", write_npz(tmp_path))
    corpus = corpora.open_corpus("own")
    assert path == cache / "own.h5" and (corpus.classes, corpus.shape) == (3, (3, 6, 5))
    assert np.array_equal(corpus.train_images(), given["x_train"]) and np.array_equal(corpus.test_images(), given["x_test"])
    assert corpus.train_labels.tolist() == given["y_train"].tolist() and corpus.test_labels.tolist() == given["y_test"].tolist()
    assert corpus.train_images().dtype == np.uint8 and corpus.train_labels.dtype == np.int64


def test_a_source_that_does_not_exist_is_named(tmp_path):
    for convert in (store.import_npz, store.import_folder, lambda name, place: store.get("mnist", place)):
        with pytest.raises(DataError, match="nowhere.*does not exist"):
            convert("own", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../own", "Own", "", "own.h5", "digits", ".own", "x" * 101, *sources.PUBLISHED])
def test_a_name_that_would_mislead_is_refused(tmp_path, cache, name):
    with pytest.raises(DataError):
        store.import_npz(name, write_npz(tmp_path))
    with pytest.raises(DataError):
        store.import_folder(name, write_folder(tmp_path / "pictures", draw_pictures()))
    assert list_left(cache) == {}


def test_a_name_that_no_file_can_have_is_refused_and_not_looked_for():
    with pytest.raises(DataError, match="up to 100 lower-case letters"):
        corpora.open_corpus("x" * 300)


def impostor(folder, name, source="/somewhere/noise.npz"):
    """A file under the name of a published data set that `get` did not make."""
    data = sources.build_labelled("noise", *draw_arrays().values())
    folder.mkdir(exist_ok=True)
    with replacing(folder / f"{name}.h5") as draft:
        archive.write(draft, name, data, source, "as the source says")
    return folder / f"{name}.h5"


@pytest.mark.parametrize("made", ["imported", "renamed"])
def test_other_data_under_the_name_of_a_published_set_are_not_taken_for_it(small_mnist, cache, made):
    renamed = made == "renamed"
    file = impostor(cache, "own", sources.PUBLISHED["mnist"].origin).rename(cache / "mnist.h5") if renamed else impostor(cache, "mnist")
    before, way_out = file.read_bytes(), "mnist.h5: is not the published 'mnist': it was made as .*Delete the file and run: hpcfl data get mnist"
    for use in (lambda: corpora.open_corpus("mnist"), lambda: store.get("mnist"), lambda: store.get("mnist", small_mnist)):
        with pytest.raises(DataError, match=way_out):
            use()
    row = next(row for row in store.list_data_sets() if row["name"] == "mnist")
    assert row["status"] == "damaged" and "hpcfl data get mnist" in row["problem"] and file.read_bytes() == before
    file.unlink()
    store.get("mnist", small_mnist)
    assert corpora.open_corpus("mnist").shape == (1, 7, 7)


def test_getting_from_a_folder_compares_what_lies_there_with_what_the_folder_holds(tmp_path, cache):
    first = store.get("tiny_imagenet", write_tiny_zip(tmp_path))
    before = first.read_bytes()
    assert store.get("tiny_imagenet", tmp_path).read_bytes() == before
    (tmp_path / "other").mkdir()
    other = write_tiny_zip(tmp_path / "other", seed=50)
    with pytest.raises(DataError, match=r"'tiny_imagenet' is there already, from .*200.zip.*, and holds other data than .*other.*Delete that file"):
        store.get("tiny_imagenet", other)
    assert first.read_bytes() == before
    first.unlink()
    assert store.get("tiny_imagenet", other).read_bytes() != before


def test_importing_the_same_data_again_changes_nothing(tmp_path):
    file = write_npz(tmp_path)
    before = store.import_npz("own", file).stat()
    assert store.import_npz("own", file).stat() == before


def test_the_same_images_of_classes_that_are_called_otherwise_are_other_data(tmp_path):
    store.import_folder("own", write_folder(tmp_path / "one", draw_pictures()))
    renamed = {name.replace("/cat/", "/cow/"): content for name, content in draw_pictures().items()}
    with pytest.raises(DataError, match="or names its classes otherwise"):
        store.import_folder("own", write_folder(tmp_path / "other", renamed))


def test_a_name_that_stands_for_other_data_is_not_overwritten(tmp_path):
    path = store.import_npz("own", write_npz(tmp_path))
    before = path.read_bytes()
    with pytest.raises(DataError, match="already holds other data"):
        store.import_npz("own", write_npz(tmp_path, y_train=(np.arange(30) + 1) % 3))
    assert path.read_bytes() == before


def test_a_full_disk_leaves_nothing_half_written(tmp_path, cache):
    file = write_npz(tmp_path, **draw_arrays(count=3000))                     # 270 kB
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.import_npz("own", file)
        except DataError as error:
            answers.put(str(error))
        os._exit(0)                                                # without HDF5's own end, which would try to write once more
    process = context.Process(target=run)
    process.start()
    process.join(30)
    assert not answers.empty() and "cannot be written" in answers.get()
    assert list_left(cache) == {}


def test_what_a_killed_process_left_is_cleared_away(tmp_path, cache):
    cache.mkdir()
    (cache / ".own.host-1.part").write_bytes(b"half")
    (cache / ".owner.host-1.part").write_bytes(b"of another data set")
    store.import_npz("own", write_npz(tmp_path))
    assert set(list_left(cache)) == {"own.h5", ".owner.host-1.part"}


def _ask(kind, source, barrier, answers):
    barrier.wait(30)
    path = {"get": lambda: store.get("tiny_imagenet", source), "import": lambda: store.import_npz("own", source)}[kind]()
    answers.put((path.stat().st_ino, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()))


@pytest.mark.parametrize("kind", ["get", "import"])
def test_several_processes_that_ask_at_once_convert_once(tmp_path, cache, monkeypatch, kind):
    source = write_tiny_zip(tmp_path) if kind == "get" else write_npz(tmp_path)
    log, write = tmp_path / "conversions", archive.write

    def counted(*arguments):
        with open(log, "a", encoding="utf-8") as file:
            file.write("x")
        write(*arguments)
    monkeypatch.setattr(archive, "write", counted)                 # inherited by the forked processes
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=_ask, args=(kind, source, barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len({answers.get() for _ in processes}) == 1 and log.read_text() == "x"
    assert len(list_left(cache)) == 1


def test_a_failed_download_says_how_to_go_on_without_a_network(cache, monkeypatch):
    datasets = pytest.importorskip("torchvision").datasets

    def refused(*_arguments, **_settings):
        raise RuntimeError("no route to host")
    monkeypatch.setattr(datasets, "MNIST", refused)
    with pytest.raises(DataError, match="hpcfl data get mnist --from FOLDER"):
        store.get("mnist")
    assert list_left(cache) == {}


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(DataError, match="did you mean 'fashion_mnist'"):
        store.get("fashion-mnist")
    with pytest.raises(DataError, match="built in"):
        store.get("digits")


def test_the_listing_tells_embedded_cached_damaged_and_absent_apart(tmp_path):
    store.import_npz("own", write_npz(tmp_path))
    broken = store.import_npz("broken", write_npz(tmp_path))
    broken.write_bytes(broken.read_bytes()[:900])
    rows = {row["name"]: row for row in store.list_data_sets()}
    assert {name: row["status"] for name, row in rows.items() if name in ("digits", "random", "own", "broken", "mnist")} == {
        "digits": "embedded", "random": "embedded", "own": "cached", "broken": "damaged", "mnist": "absent"}
    assert rows["own"]["shape"] == [3, 6, 5] and rows["own"]["train"] == 30 and "broken.h5" in rows["broken"]["problem"]


def test_a_listing_of_no_cache_makes_none(cache):
    assert {row["status"] for row in store.list_data_sets()} == {"embedded", "absent"} and not cache.exists()
