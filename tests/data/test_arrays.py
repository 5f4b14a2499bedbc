"""Arrays: an .npz file of one's own becomes uint8 images and labels from 0, every change to it is noted, and what is no data set is refused."""
import pickle

import numpy as np
import pytest

from hpcfl.data import archive, corpora, store
from hpcfl.data.arrays import read_npz
from hpcfl.errors import DataError
from tests.support.data_files import Trap, draw_arrays, list_left, write_npz

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("layout", ["NHWC", "NHW", "column labels"])
def test_other_layouts_mean_the_same_images(tmp_path, layout):
    given = draw_arrays(shape=(1, 6, 5) if layout == "NHW" else (3, 6, 5))
    changed = {"NHWC": {name: given[name].transpose(0, 2, 3, 1) for name in ("x_train", "x_test")},
               "NHW": {name: given[name][:, 0] for name in ("x_train", "x_test")},
               "column labels": {name: given[name][:, None] for name in ("y_train", "y_test")}}[layout]
    store.import_npz("own", write_npz(tmp_path, **changed))
    assert np.array_equal(corpora.open_corpus("own").train_images(), given["x_train"])


def test_floats_between_zero_and_one_become_bytes_and_that_is_noted(tmp_path):
    given = draw_arrays()
    path = store.import_npz("own", write_npz(tmp_path, x_train=given["x_train"] / np.float32(255)))
    images = corpora.open_corpus("own").train_images()
    assert images.dtype == np.uint8 and np.array_equal(images, given["x_train"])
    assert archive.read_header(path).notes == ("x_train was float32 in [0, 1] and became uint8, 255 times as large",)


def test_floats_between_the_levels_are_noted_with_what_rounding_took(tmp_path):
    images = np.full((6, 3, 6, 5), 0.5 / 255)
    images[0] = 1.0
    path = store.import_npz("own", write_npz(tmp_path, x_test=images))
    assert archive.read_header(path).notes == (
        "x_test was float64 in [0, 1] and became uint8, 255 times as large, numbers between these levels rounded, by 0.002 at most",)


def test_images_that_are_nearly_black_are_noted(tmp_path):
    given = draw_arrays()
    path = store.import_npz("own", write_npz(tmp_path, x_train=given["x_train"] // 128, x_test=given["x_test"] // 128))
    assert archive.read_header(path).notes == ("no value is above 1 of 255: the images are nearly black; save them as 0 to 255, or as floats in [0, 1]",)


def with_nan():
    images = draw_arrays()["x_train"] / 255.0
    images[4, 0, 0, 0] = np.nan
    return images


@pytest.mark.parametrize(("changes", "message"), [
    ({"x_train": with_nan()}, "x_train holds NaN or infinity, first in image 4"),
    ({"x_train": draw_arrays()["x_train"].astype(np.float32)}, r"x_train is float32 in \[0, 255\]"),
    ({"x_train": draw_arrays()["x_train"].astype(np.int64)}, "x_train is int64; wanted uint8"),
    ({"x_test": draw_arrays()["x_test"][..., :4]}, "one size"),
    ({"x_train": draw_arrays()["x_train"][:, [0, 1]]}, "x_train has shape"),
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
    ({"x_val": draw_arrays()["x_test"], "y_val": draw_arrays()["y_test"]}, "holds x_val, y_val too"),
    ({"x_test": draw_arrays()["x_test"][:0], "y_test": np.arange(0)}, "at least one"),
    ({"y_test": None}, "has no y_test"),
])
def test_an_npz_that_is_not_a_data_set_is_refused_by_name_and_leaves_nothing(tmp_path, cache, changes, message):
    file = write_npz(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        store.import_npz("own", file)
    assert str(file) in str(caught.value) and caught.value.exit_code == 4
    assert list_left(cache) == {}


def test_no_pickle_is_run_whatever_it_is_called(tmp_path, cache):
    sprung = tmp_path / "sprung"
    np.savez(tmp_path / "object.npz", **draw_arrays() | {"x_train": np.array([Trap(sprung)], dtype=object)})
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Trap(sprung)))
    for name in ("object.npz", "raw.npz"):
        with pytest.raises(DataError, match=name):
            store.import_npz("own", tmp_path / name)
    assert not sprung.exists() and list_left(cache) == {}


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_npz_is_refused_or_harmless(tmp_path, damage):
    file, generator = write_npz(tmp_path), np.random.default_rng(0)
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
