"""Store: conversion into the cache, once and whole or not at all, and what is refused on the way."""
import gzip
import hashlib
import multiprocessing
import os
import pickle
import resource
import struct
import zipfile
from io import BytesIO

import h5py
import numpy as np
import pytest
from PIL import Image

from hpcfl.data import archive, corpora, sources, store
from hpcfl.data.arrays import read_npz
from hpcfl.errors import DataError
from hpcfl.files.atomic import replacing


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def arrays(count=30, shape=(3, 6, 5), seed=0):
    generator = np.random.default_rng(seed)
    return {"x_train": generator.integers(0, 256, (count, *shape), dtype=np.uint8), "y_train": np.arange(count) % 3,
            "x_test": generator.integers(0, 256, (6, *shape), dtype=np.uint8), "y_test": np.arange(6) % 3}


def npz(folder, **changes):
    """An .npz file with some arrays changed; None leaves one out."""
    file = folder / "own.npz"
    np.savez(file, **{name: array for name, array in (arrays() | changes).items() if array is not None})
    return file


def left_in(cache):
    """What a user would find in the cache: locks and stamps aside, the files and their sizes."""
    return {file.name: file.stat().st_size for file in cache.glob("*") if not file.name.endswith((".lock", ".verified"))} if cache.exists() else {}


def picture(size=(5, 6), mode="RGB", kind="PNG", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def folder_of(base, files):
    for name, content in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)
    return base


def pictures():
    train = {f"train/{name}/{index}.png": picture(seed=10 * row + index) for row, name in enumerate(("cat", "dog")) for index in range(3)}
    return train | {"test/dog/a.png": picture(seed=77), "test/cat/b.png": picture(seed=78)}


def test_an_npz_comes_back_as_it_went_in(tmp_path, cache):
    given = arrays()
    path = store.import_npz("own", npz(tmp_path))
    corpus = corpora.open_corpus("own")
    assert path == cache / "own.h5" and (corpus.classes, corpus.shape) == (3, (3, 6, 5))
    assert np.array_equal(corpus.train_images(), given["x_train"]) and np.array_equal(corpus.test_images(), given["x_test"])
    assert corpus.train_labels.tolist() == given["y_train"].tolist() and corpus.test_labels.tolist() == given["y_test"].tolist()
    assert corpus.train_images().dtype == np.uint8 and corpus.train_labels.dtype == np.int64


def test_the_file_has_the_documented_layout_and_sum(tmp_path):
    given = arrays()
    with h5py.File(store.import_npz("own", npz(tmp_path))) as file:
        assert {name: (file[name].shape, str(file[name].dtype)) for name in ("train/images", "train/labels", "test/images", "test/labels")} == {
            "train/images": ((30, 3, 6, 5), "uint8"), "train/labels": ((30,), "int64"),
            "test/images": ((6, 3, 6, 5), "uint8"), "test/labels": ((6,), "int64")}
        content = b"".join(given[name].tobytes() for name in ("x_train", "y_train", "x_test", "y_test"))
        assert file.attrs["sha256"].decode() == hashlib.sha256(content).hexdigest()
        assert (file.attrs["name"], file.attrs["classes"]) == (b"own", 3) and {"source", "licence", "hpcfl_version"} <= set(file.attrs)


@pytest.mark.parametrize("layout", ["NHWC", "NHW", "column labels"])
def test_other_layouts_mean_the_same_images(tmp_path, layout):
    given = arrays(shape=(1, 6, 5) if layout == "NHW" else (3, 6, 5))
    changed = {"NHWC": {name: given[name].transpose(0, 2, 3, 1) for name in ("x_train", "x_test")},
               "NHW": {name: given[name][:, 0] for name in ("x_train", "x_test")},
               "column labels": {name: given[name][:, None] for name in ("y_train", "y_test")}}[layout]
    store.import_npz("own", npz(tmp_path, **changed))
    assert np.array_equal(corpora.open_corpus("own").train_images(), given["x_train"])


def test_floats_between_zero_and_one_become_bytes_and_that_is_noted(tmp_path):
    given = arrays()
    path = store.import_npz("own", npz(tmp_path, x_train=given["x_train"] / np.float32(255)))
    images = corpora.open_corpus("own").train_images()
    assert images.dtype == np.uint8 and np.array_equal(images, given["x_train"])
    assert archive.read_header(path).notes == ("x_train was float32 in [0, 1] and became uint8, 255 times as large",)


def test_floats_between_the_levels_are_noted_with_what_rounding_took(tmp_path):
    images = np.full((6, 3, 6, 5), 0.5 / 255)
    images[0] = 1.0
    path = store.import_npz("own", npz(tmp_path, x_test=images))
    assert archive.read_header(path).notes == (
        "x_test was float64 in [0, 1] and became uint8, 255 times as large, numbers between these levels rounded, by 0.002 at most",)


def test_images_that_are_nearly_black_are_noted(tmp_path):
    given = arrays()
    path = store.import_npz("own", npz(tmp_path, x_train=given["x_train"] // 128, x_test=given["x_test"] // 128))
    assert archive.read_header(path).notes == ("no value is above 1 of 255: the images are nearly black; save them as 0 to 255, or as floats in [0, 1]",)


def with_nan():
    images = arrays()["x_train"] / 255.0
    images[4, 0, 0, 0] = np.nan
    return images


@pytest.mark.parametrize(("changes", "message"), [
    ({"x_train": with_nan()}, "x_train holds NaN or infinity, first in image 4"),
    ({"x_train": arrays()["x_train"].astype(np.float32)}, r"x_train is float32 in \[0, 255\]"),
    ({"x_train": arrays()["x_train"].astype(np.int64)}, "x_train is int64; wanted uint8"),
    ({"x_test": arrays()["x_test"][..., :4]}, "one size"),
    ({"x_train": arrays()["x_train"][:, [0, 1]]}, "x_train has shape"),
    ({"x_train": np.array([[1], "two"], dtype=object)}, "pickled"),
    ({"y_train": np.array([{"a": 1}] * 30)}, "pickled"),
    ({"y_train": np.linspace(0, 1, 30)}, "y_train is float64"),
    ({"y_train": np.array([0.0, np.nan] * 15)}, "y_train is float64"),
    ({"y_train": np.arange(30) % 3 == 1}, "y_train is bool"),
    ({"y_train": np.array(["cat", "dog"] * 15)}, "y_train is <U3.*return_inverse=True"),
    ({"y_train": np.eye(3, dtype=np.int64)[np.arange(30) % 3]}, r"y_train is int64 of shape \(30, 3\)"),
    ({"y_train": np.int64(1)}, r"y_train is int64 of shape \(\)"),
    ({"y_train": np.arange(30) - 1}, "label -1 is negative"),
    ({"y_train": np.arange(29) % 3}, "30 training images and 29 training labels"),
    ({"y_test": np.arange(6) * 10**9}, "5 test images of class 1000000000, .*, which has no training images .those are of class 0, 1, 2."),
    ({"y_train": np.arange(30) % 3 * 2}, "2 test images of class 1, which has no training images .those are of class 0, 2, 4."),
    ({"client_train": np.arange(30)}, "holds client_train too, and only x_train, y_train, x_test, y_test are read .*data.partition"),
    ({"x_val": arrays()["x_test"], "y_val": arrays()["y_test"]}, "holds x_val, y_val too"),
    ({"x_test": arrays()["x_test"][:0], "y_test": np.arange(0)}, "at least one"),
    ({"y_test": None}, "has no y_test"),
])
def test_an_npz_that_is_not_a_data_set_is_refused_by_name_and_leaves_nothing(tmp_path, cache, changes, message):
    file = npz(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        store.import_npz("own", file)
    assert str(file) in str(caught.value) and caught.value.exit_code == 4
    assert left_in(cache) == {}


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_no_pickle_is_run_whatever_it_is_called(tmp_path, cache):
    sprung = tmp_path / "sprung"
    np.savez(tmp_path / "object.npz", **arrays() | {"x_train": np.array([Trap(sprung)], dtype=object)})
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("object.npz", "raw.npz"):
        with pytest.raises(DataError, match=name):
            store.import_npz("own", tmp_path / name)
    assert not sprung.exists() and left_in(cache) == {}


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_npz_is_refused_or_harmless(tmp_path, damage):
    file, generator = npz(tmp_path), np.random.default_rng(0)
    whole, wanted, refused = file.read_bytes(), archive.compute_digest(read_npz(file)), 0
    for _ in range(60):
        at, content = int(generator.integers(len(whole))), bytearray(whole)
        content[at] ^= 0xFF
        file.write_bytes(whole[:at] if damage == "truncate" else content)
        try:
            assert archive.compute_digest(read_npz(file)) == wanted
        except DataError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > 40                                            # the rest hit bytes that mean nothing, such as time stamps


def test_a_source_that_does_not_exist_is_named(tmp_path):
    for convert in (store.import_npz, store.import_folder, lambda name, place: store.get("mnist", place)):
        with pytest.raises(DataError, match="nowhere.*does not exist"):
            convert("own", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../own", "Own", "", "own.h5", "digits", ".own", "x" * 101, *sources.PUBLISHED])
def test_a_name_that_would_mislead_is_refused(tmp_path, cache, name):
    with pytest.raises(DataError):
        store.import_npz(name, npz(tmp_path))
    with pytest.raises(DataError):
        store.import_folder(name, folder_of(tmp_path / "pictures", pictures()))
    assert left_in(cache) == {}


def test_a_name_that_no_file_can_have_is_refused_and_not_looked_for():
    with pytest.raises(DataError, match="up to 100 lower-case letters"):
        corpora.open_corpus("x" * 300)


def impostor(folder, name, source="/somewhere/noise.npz"):
    """A file under the name of a published data set that `get` did not make."""
    data = sources.build_labelled("noise", *arrays().values())
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
    first = store.get("tiny_imagenet", tiny_zip(tmp_path))
    before = first.read_bytes()
    assert store.get("tiny_imagenet", tmp_path).read_bytes() == before
    (tmp_path / "other").mkdir()
    other = tiny_zip(tmp_path / "other", seed=50)
    with pytest.raises(DataError, match=r"'tiny_imagenet' is there already, from .*200.zip.*, and holds other data than .*other.*Delete that file"):
        store.get("tiny_imagenet", other)
    assert first.read_bytes() == before
    first.unlink()
    assert store.get("tiny_imagenet", other).read_bytes() != before


def test_importing_the_same_data_again_changes_nothing(tmp_path):
    file = npz(tmp_path)
    before = store.import_npz("own", file).stat()
    assert store.import_npz("own", file).stat() == before


def test_the_same_images_of_classes_that_are_called_otherwise_are_other_data(tmp_path):
    store.import_folder("own", folder_of(tmp_path / "one", pictures()))
    renamed = {name.replace("/cat/", "/cow/"): content for name, content in pictures().items()}
    with pytest.raises(DataError, match="or names its classes otherwise"):
        store.import_folder("own", folder_of(tmp_path / "other", renamed))


def test_a_name_that_stands_for_other_data_is_not_overwritten(tmp_path):
    path = store.import_npz("own", npz(tmp_path))
    before = path.read_bytes()
    with pytest.raises(DataError, match="already holds other data"):
        store.import_npz("own", npz(tmp_path, y_train=(np.arange(30) + 1) % 3))
    assert path.read_bytes() == before


def test_a_full_disk_leaves_nothing_half_written(tmp_path, cache):
    file = npz(tmp_path, **arrays(count=3000))                     # 270 kB
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
    assert left_in(cache) == {}


def test_what_a_killed_process_left_is_cleared_away(tmp_path, cache):
    cache.mkdir()
    (cache / ".own.host-1.part").write_bytes(b"half")
    (cache / ".owner.host-1.part").write_bytes(b"of another data set")
    store.import_npz("own", npz(tmp_path))
    assert set(left_in(cache)) == {"own.h5", ".owner.host-1.part"}


def _ask(kind, source, barrier, answers):
    barrier.wait(30)
    path = {"get": lambda: store.get("tiny_imagenet", source), "import": lambda: store.import_npz("own", source)}[kind]()
    answers.put((path.stat().st_ino, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()))


@pytest.mark.parametrize("kind", ["get", "import"])
def test_several_processes_that_ask_at_once_convert_once(tmp_path, cache, monkeypatch, kind):
    source = tiny_zip(tmp_path) if kind == "get" else npz(tmp_path)
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
    assert len(left_in(cache)) == 1


def test_a_folder_of_pictures_becomes_classes_in_order_of_their_names(tmp_path):
    store.import_folder("own", folder_of(tmp_path / "pictures", pictures()))
    corpus = corpora.open_corpus("own")
    assert corpus.shape == (3, 5, 6) and corpus.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and corpus.test_labels.tolist() == [0, 1]
    for index, seed in enumerate((0, 1, 2, 10, 11, 12)):
        drawn = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        assert np.array_equal(corpus.train_images(np.array([index]))[0], drawn.transpose(2, 0, 1))


def test_grey_pictures_keep_one_channel_unless_one_has_colour(tmp_path):
    grey = {name: picture(mode="L", seed=index) for index, name in enumerate(pictures())}
    store.import_folder("grey", folder_of(tmp_path / "grey", grey))
    store.import_folder("mixed", folder_of(tmp_path / "mixed", grey | {"test/dog/a.png": picture(mode="RGBA")}))
    assert corpora.open_corpus("grey").shape == (1, 5, 6) and corpora.open_corpus("mixed").shape == (3, 5, 6)
    assert np.array_equal(corpora.open_corpus("mixed").train_images()[:, :1], corpora.open_corpus("grey").train_images())


def test_val_serves_as_test_and_a_zip_as_a_folder(tmp_path):
    renamed = {name.replace("test/", "val/"): content for name, content in pictures().items()}
    store.import_folder("one", folder_of(tmp_path / "plain", renamed))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        for name, content in renamed.items():
            packed.writestr(f"around/{name}", content)
    store.import_folder("other", tmp_path / "packed.zip")
    assert corpora.open_corpus("one").sha256 == corpora.open_corpus("other").sha256


HIDDEN = ("train/.ipynb_checkpoints/0.png", "train/cat/.hidden.png", "train/cat/.thumbnails/0.png", ".cache/train/bird/0.png", "test/.hidden/0.png",
          "__MACOSX/train/cat/._0.png", "train/__MACOSX/0.png", "train/cat/Thumbs.db")


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_names_are_no_data_at_any_depth(tmp_path, packed):
    plain = folder_of(tmp_path / "plain", pictures())
    source = folder_of(tmp_path / "hidden", pictures() | dict.fromkeys(HIDDEN, b"no picture"))
    if packed:
        with zipfile.ZipFile(tmp_path / "hidden.zip", "w") as file:
            for name, content in (dict.fromkeys(HIDDEN, b"no picture") | pictures()).items():
                file.writestr(name, content)
        source = tmp_path / "hidden.zip"
    found, wanted = sources.read_folder(source), sources.read_folder(plain)
    assert archive.compute_digest(found) == archive.compute_digest(wanted) and found.names == ("cat", "dog") and found.notes == ()


def test_what_is_left_out_of_a_folder_is_noted(tmp_path):
    base = folder_of(tmp_path / "pictures", pictures() | {"val/cat/0.png": picture(), "train/cat/0.bmp": b"", "train/0.png": picture(), "labels.csv": b""})
    (base / "train" / "bird").mkdir()
    (base / "train" / "cow" / "deeper").mkdir(parents=True)
    (base / "test" / "bird").mkdir()
    notes = sources.read_folder(base).notes
    for note, folder in zip(notes, ("test/bird/", "train/bird/", "train/cow/"), strict=False):
        assert note.startswith(f"{folder} holds no .png, .jpg, .jpeg file and is left out")
    assert notes[3:] == ("4 files left out, in no folder of a class or of no kind that is read: labels.csv, train/0.png, train/cat/0.bmp, val/cat/0.png",)


def test_an_empty_folder_of_an_archive_is_noted_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.mkdir("around/train/bird")
        for name, content in pictures().items():
            packed.writestr(f"around/{name}", content)
    assert [note.split()[0] for note in sources.read_folder(tmp_path / "packed.zip").notes] == ["train/bird/"]


def test_pictures_that_change_their_kind_are_noted(tmp_path):
    found = sources.read_folder(folder_of(tmp_path / "pictures", pictures() | {"test/dog/a.png": picture(mode="RGBA"), "train/cat/0.png": picture(mode="L")}))
    assert found.notes == ("images of Pillow's kinds L, RGBA became RGB, without transparency where they had any",)


def test_an_error_shows_no_address_in_memory(tmp_path):
    with pytest.raises(DataError, match="train/dog/1.png cannot be read as an image .cannot identify image file.; it is") as caught:
        store.import_folder("own", folder_of(tmp_path / "pictures", pictures() | {"train/dog/1.png": b"no picture"}))
    assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"train/dog/1.png": picture(size=(5, 7))}, "train/dog/1.png is 5 x 7 pixels, the first image is 5 x 6"),
    ({"test/dog/a.png": picture(size=(6, 6))}, "test/dog/a.png is 6 x 6 pixels"),
    ({"train/dog/1.png": picture()[:60]}, "train/dog/1.png cannot be read"),
    ({"train/dog/1.png": b"no picture"}, "train/dog/1.png cannot be read"),
    ({"train/dog/1.png": picture(mode="I", kind="TIFF")}, "train/dog/1.png has pixels of kind 'I'"),
    ({"test/bird/1.png": picture()}, "test/bird/1.png is of class 'bird'"),
])
def test_a_picture_that_does_not_fit_is_named_and_leaves_nothing(tmp_path, cache, changes, message):
    with pytest.raises(DataError, match=message):
        store.import_folder("own", folder_of(tmp_path / "pictures", pictures() | changes))
    assert left_in(cache) == {}


def test_a_folder_without_train_or_test_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folder train/"):
        store.import_folder("own", folder_of(tmp_path / "one", {"cat/1.png": picture()}))
    with pytest.raises(DataError, match="no images in test/ or val/"):
        store.import_folder("own", folder_of(tmp_path / "other", {"train/cat/1.png": picture()}))


def tiny_zip(base, seed=0):
    """Tiny-ImageNet's layout with two classes."""
    files = {f"train/{name}/images/{name}_{index}.JPEG": picture((64, 64), kind="JPEG", seed=seed + index) for name in ("n02", "n01") for index in range(3)}
    files |= {f"val/images/val_{index}.JPEG": picture((64, 64), "L", "JPEG", seed=index) for index in range(2)}
    files |= {"val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n",
              "wnids.txt": b"n01\nn02\n", "test/images/test_0.JPEG": b""}
    with zipfile.ZipFile(base / "tiny-imagenet-200.zip", "w") as packed:
        for name, content in files.items():
            packed.writestr(f"tiny-imagenet-200/{name}", content)
    return base / "tiny-imagenet-200.zip"


def test_tiny_imagenet_reads_its_val_part_as_test_set_from_zip_or_folder(tmp_path, cache):
    packed = tiny_zip(tmp_path)
    store.get("tiny_imagenet", packed)
    corpus = corpora.open_corpus("tiny_imagenet")
    assert corpus.shape == (3, 64, 64) and corpus.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and corpus.test_labels.tolist() == [1, 0]
    zipfile.ZipFile(packed).extractall(tmp_path / "unpacked")
    for place in (tmp_path, tmp_path / "unpacked", tmp_path / "unpacked" / "tiny-imagenet-200"):
        assert archive.compute_digest(sources.read_tiny_imagenet(place)) == corpus.sha256


def idx(values):
    return struct.pack(f">2xBB{values.ndim}i", 8, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder like torchvision's, with MD5 sums to match."""
    datasets = pytest.importorskip("torchvision").datasets
    given = arrays(shape=(7, 7))
    files = {"train-images-idx3-ubyte": given["x_train"], "train-labels-idx1-ubyte": given["y_train"].astype(np.uint8),
             "t10k-images-idx3-ubyte": given["x_test"], "t10k-labels-idx1-ubyte": given["y_test"].astype(np.uint8)}
    packed = {f"{name}.gz": gzip.compress(idx(values)) for name, values in files.items()}
    folder_of(tmp_path / "root" / "MNIST" / "raw", packed)
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()])
    return tmp_path / "root"


def test_mnist_comes_from_the_folder_that_torchvision_calls_root(small_mnist):
    store.get("mnist", small_mnist)
    corpus = corpora.open_corpus("mnist")
    assert corpus.shape == (1, 7, 7) and np.array_equal(corpus.train_images()[:, 0], arrays(shape=(7, 7))["x_train"])


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: content[:50] + b"?" + content[51:]])
def test_a_damaged_mnist_file_is_named_with_both_sums(small_mnist, cache, damage):
    file = small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz: its MD5 sum is"):
        store.get("mnist", small_mnist)
    assert left_in(cache) == {}


def test_unpacked_mnist_files_are_checked_by_their_length(small_mnist):
    for packed in (small_mnist / "MNIST" / "raw").glob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    wanted = archive.compute_digest(sources.PUBLISHED["mnist"].read(small_mnist))
    assert wanted == archive.compute_digest(sources.PUBLISHED["mnist"].read(small_mnist / "MNIST"))
    file = small_mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte: cannot be read as an IDX file"):
        store.get("mnist", small_mnist)


def test_a_folder_without_the_files_is_told_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="MNIST/raw/train-images-idx3-ubyte.gz"):
        store.get("mnist", tmp_path)


def cifar(base, monkeypatch):
    """Two training batches and a test batch like CIFAR-10's, with MD5 sums to match."""
    datasets = pytest.importorskip("torchvision").datasets
    given = arrays(count=8, shape=(3, 32, 32))
    parts = {"data_batch_1": slice(0, 4), "data_batch_2": slice(4, 8)}
    files = {name: pickle.dumps({"data": given["x_train"][rows].reshape(4, -1), "labels": given["y_train"][rows].tolist()})
             for name, rows in parts.items()}
    files |= {"test_batch": pickle.dumps({"data": given["x_test"].reshape(6, -1), "labels": given["y_test"].tolist()}),
              "batches.meta": pickle.dumps({"label_names": ["a", "b", "c"]})}
    folder_of(base / "cifar-10-batches-py", files)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, sums[name]] for name in parts])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]})
    return base


def test_cifar_comes_through_torchvision_with_channels_first(tmp_path, monkeypatch):
    store.get("cifar10", cifar(tmp_path, monkeypatch))
    corpus, given = corpora.open_corpus("cifar10"), arrays(count=8, shape=(3, 32, 32))
    assert np.array_equal(corpus.train_images(), given["x_train"]) and np.array_equal(corpus.test_images(), given["x_test"])
    assert corpus.train_labels.tolist() == given["y_train"].tolist()


def test_a_cifar_file_that_is_not_the_official_one_is_not_opened(tmp_path, cache, monkeypatch):
    root = cifar(tmp_path, monkeypatch)
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(DataError, match="CIFAR10 is not there or not whole"):
        store.get("cifar10", root)
    assert not (tmp_path / "sprung").exists() and left_in(cache) == {}


def test_a_failed_download_says_how_to_go_on_without_a_network(cache, monkeypatch):
    datasets = pytest.importorskip("torchvision").datasets

    def refused(*_arguments, **_settings):
        raise RuntimeError("no route to host")
    monkeypatch.setattr(datasets, "MNIST", refused)
    with pytest.raises(DataError, match="hpcfl data get mnist --from FOLDER"):
        store.get("mnist")
    assert left_in(cache) == {}


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(DataError, match="did you mean 'fashion_mnist'"):
        store.get("fashion-mnist")
    with pytest.raises(DataError, match="built in"):
        store.get("digits")


def test_the_listing_tells_embedded_cached_damaged_and_absent_apart(tmp_path):
    store.import_npz("own", npz(tmp_path))
    broken = store.import_npz("broken", npz(tmp_path))
    broken.write_bytes(broken.read_bytes()[:900])
    rows = {row["name"]: row for row in store.list_data_sets()}
    assert {name: row["status"] for name, row in rows.items() if name in ("digits", "random", "own", "broken", "mnist")} == {
        "digits": "embedded", "random": "embedded", "own": "cached", "broken": "damaged", "mnist": "absent"}
    assert rows["own"]["shape"] == [3, 6, 5] and rows["own"]["train"] == 30 and "broken.h5" in rows["broken"]["problem"]


def test_a_listing_of_no_cache_makes_none(cache):
    assert {row["status"] for row in store.list_data_sets()} == {"embedded", "absent"} and not cache.exists()


@pytest.mark.parametrize(("name", "place", "shape", "sizes"), [
    ("mnist", ".", (1, 28, 28), (60000, 10000)), ("fashion_mnist", ".", (1, 28, 28), (60000, 10000)),
    ("tiny_imagenet", "tiny-imagenet-200-mini.zip", (3, 64, 64), (1500, 250))])
def test_real_data_sets_convert(data_folder, name, place, shape, sizes):
    if not any((data_folder / place).glob("MNIST")) and not (data_folder / place).is_file():
        pytest.skip(f"{data_folder} has no {name}")
    store.get(name, data_folder / place)
    corpus = corpora.open_corpus(name)
    assert corpus.shape == shape and (len(corpus.train_labels), len(corpus.test_labels)) == sizes
    assert (np.bincount(corpus.train_labels) > 0).all()
