"""Sources: folders of pictures and the formats of published sets become the same images and labels wherever they lie, and what is damaged is named."""
import gzip
import hashlib
import pickle
import zipfile

import numpy as np
import pytest

from hpcfl.data import archive, corpora, sources, store
from hpcfl.errors import DataError
from tests.support.data_files import Trap, draw_arrays, draw_pictures, encode_picture, list_left, write_folder, write_tiny_zip

pytestmark = pytest.mark.usefixtures("cache")

HIDDEN = ("train/.ipynb_checkpoints/0.png", "train/cat/.hidden.png", "train/cat/.thumbnails/0.png", ".cache/train/bird/0.png", "test/.hidden/0.png",
          "__MACOSX/train/cat/._0.png", "train/__MACOSX/0.png", "train/cat/Thumbs.db")


def test_a_folder_of_pictures_becomes_classes_in_order_of_their_names(tmp_path):
    store.import_folder("own", write_folder(tmp_path / "pictures", draw_pictures()))
    corpus = corpora.open_corpus("own")
    assert corpus.shape == (3, 5, 6) and corpus.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and corpus.test_labels.tolist() == [0, 1]
    for index, seed in enumerate((0, 1, 2, 10, 11, 12)):
        drawn = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        assert np.array_equal(corpus.train_images(np.array([index]))[0], drawn.transpose(2, 0, 1))


def test_grey_pictures_keep_one_channel_unless_one_has_colour(tmp_path):
    grey = {name: encode_picture(mode="L", seed=index) for index, name in enumerate(draw_pictures())}
    store.import_folder("grey", write_folder(tmp_path / "grey", grey))
    store.import_folder("mixed", write_folder(tmp_path / "mixed", grey | {"test/dog/a.png": encode_picture(mode="RGBA")}))
    assert corpora.open_corpus("grey").shape == (1, 5, 6) and corpora.open_corpus("mixed").shape == (3, 5, 6)
    assert np.array_equal(corpora.open_corpus("mixed").train_images()[:, :1], corpora.open_corpus("grey").train_images())


def test_val_serves_as_test_and_a_zip_as_a_folder(tmp_path):
    renamed = {name.replace("test/", "val/"): content for name, content in draw_pictures().items()}
    store.import_folder("one", write_folder(tmp_path / "plain", renamed))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        for name, content in renamed.items():
            packed.writestr(f"around/{name}", content)
    store.import_folder("other", tmp_path / "packed.zip")
    assert corpora.open_corpus("one").sha256 == corpora.open_corpus("other").sha256


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_names_are_no_data_at_any_depth(tmp_path, packed):
    plain = write_folder(tmp_path / "plain", draw_pictures())
    source = write_folder(tmp_path / "hidden", draw_pictures() | dict.fromkeys(HIDDEN, b"no picture"))
    if packed:
        with zipfile.ZipFile(tmp_path / "hidden.zip", "w") as file:
            for name, content in (dict.fromkeys(HIDDEN, b"no picture") | draw_pictures()).items():
                file.writestr(name, content)
        source = tmp_path / "hidden.zip"
    found, wanted = sources.read_folder(source), sources.read_folder(plain)
    assert archive.compute_digest(found) == archive.compute_digest(wanted) and found.names == ("cat", "dog") and found.notes == ()


def test_what_is_left_out_of_a_folder_is_noted(tmp_path):
    base = write_folder(tmp_path / "pictures", draw_pictures() | {"val/cat/0.png": encode_picture(), "train/cat/0.bmp": b"", "train/0.png": encode_picture(),
                                                                  "labels.csv": b""})
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
        for name, content in draw_pictures().items():
            packed.writestr(f"around/{name}", content)
    assert [note.split()[0] for note in sources.read_folder(tmp_path / "packed.zip").notes] == ["train/bird/"]


def test_pictures_that_change_their_kind_are_noted(tmp_path):
    found = sources.read_folder(write_folder(tmp_path / "pictures", draw_pictures() | {"test/dog/a.png": encode_picture(mode="RGBA"),
                                                                                       "train/cat/0.png": encode_picture(mode="L")}))
    assert found.notes == ("images of Pillow's kinds L, RGBA became RGB, without transparency where they had any",)


def test_an_error_shows_no_address_in_memory(tmp_path):
    with pytest.raises(DataError, match="train/dog/1.png cannot be read as an image .cannot identify image file.; it is") as caught:
        store.import_folder("own", write_folder(tmp_path / "pictures", draw_pictures() | {"train/dog/1.png": b"no picture"}))
    assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"train/dog/1.png": encode_picture(size=(5, 7))}, "train/dog/1.png is 5 x 7 pixels, the first image is 5 x 6"),
    ({"test/dog/a.png": encode_picture(size=(6, 6))}, "test/dog/a.png is 6 x 6 pixels"),
    ({"train/dog/1.png": encode_picture()[:60]}, "train/dog/1.png cannot be read"),
    ({"train/dog/1.png": b"no picture"}, "train/dog/1.png cannot be read"),
    ({"train/dog/1.png": encode_picture(mode="I", kind="TIFF")}, "train/dog/1.png has pixels of kind 'I'"),
    ({"test/bird/1.png": encode_picture()}, "test/bird/1.png is of class 'bird'"),
])
def test_a_picture_that_does_not_fit_is_named_and_leaves_nothing(tmp_path, cache, changes, message):
    with pytest.raises(DataError, match=message):
        store.import_folder("own", write_folder(tmp_path / "pictures", draw_pictures() | changes))
    assert list_left(cache) == {}


def test_a_folder_without_train_or_test_is_refused(tmp_path):
    with pytest.raises(DataError, match="no folder train/"):
        store.import_folder("own", write_folder(tmp_path / "one", {"cat/1.png": encode_picture()}))
    with pytest.raises(DataError, match="no images in test/ or val/"):
        store.import_folder("own", write_folder(tmp_path / "other", {"train/cat/1.png": encode_picture()}))


def test_tiny_imagenet_reads_its_val_part_as_test_set_from_zip_or_folder(tmp_path, cache):
    packed = write_tiny_zip(tmp_path)
    store.get("tiny_imagenet", packed)
    corpus = corpora.open_corpus("tiny_imagenet")
    assert corpus.shape == (3, 64, 64) and corpus.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and corpus.test_labels.tolist() == [1, 0]
    zipfile.ZipFile(packed).extractall(tmp_path / "unpacked")
    for place in (tmp_path, tmp_path / "unpacked", tmp_path / "unpacked" / "tiny-imagenet-200"):
        assert archive.compute_digest(sources.read_tiny_imagenet(place)) == corpus.sha256


def test_mnist_comes_from_the_folder_that_torchvision_calls_root(small_mnist):
    store.get("mnist", small_mnist)
    corpus = corpora.open_corpus("mnist")
    assert corpus.shape == (1, 7, 7) and np.array_equal(corpus.train_images()[:, 0], draw_arrays(shape=(7, 7))["x_train"])


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: content[:50] + b"?" + content[51:]])
def test_a_damaged_mnist_file_is_named_with_both_sums(small_mnist, cache, damage):
    file = small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz: its MD5 sum is"):
        store.get("mnist", small_mnist)
    assert list_left(cache) == {}


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
    given = draw_arrays(count=8, shape=(3, 32, 32))
    parts = {"data_batch_1": slice(0, 4), "data_batch_2": slice(4, 8)}
    files = {name: pickle.dumps({"data": given["x_train"][rows].reshape(4, -1), "labels": given["y_train"][rows].tolist()})
             for name, rows in parts.items()}
    files |= {"test_batch": pickle.dumps({"data": given["x_test"].reshape(6, -1), "labels": given["y_test"].tolist()}),
              "batches.meta": pickle.dumps({"label_names": ["a", "b", "c"]})}
    write_folder(base / "cifar-10-batches-py", files)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, sums[name]] for name in parts])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]})
    return base


def test_cifar_comes_through_torchvision_with_channels_first(tmp_path, monkeypatch):
    store.get("cifar10", cifar(tmp_path, monkeypatch))
    corpus, given = corpora.open_corpus("cifar10"), draw_arrays(count=8, shape=(3, 32, 32))
    assert np.array_equal(corpus.train_images(), given["x_train"]) and np.array_equal(corpus.test_images(), given["x_test"])
    assert corpus.train_labels.tolist() == given["y_train"].tolist()


def test_a_cifar_file_that_is_not_the_official_one_is_not_opened(tmp_path, cache, monkeypatch):
    root = cifar(tmp_path, monkeypatch)
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(DataError, match="CIFAR10 is not there or not whole"):
        store.get("cifar10", root)
    assert not (tmp_path / "sprung").exists() and list_left(cache) == {}


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
