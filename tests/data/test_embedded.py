"""The data sets that need no file are the same everywhere."""
import numpy as np
import pytest

from hpcfl.data import corpora


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
