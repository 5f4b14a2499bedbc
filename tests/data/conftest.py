"""What tests of data sets share: an empty cache, a data set in it, and a small MNIST."""
import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from hpcfl.data import store
from tests.support.data_files import draw_arrays, draw_content, pack_idx, write_folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of an empty cache."""
    monkeypatch.setenv("HPCFL_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def own(cache, tmp_path) -> Path:
    """A data set 'own' in an empty cache."""
    np.savez(tmp_path / "own.npz", **draw_content())
    return store.import_npz("own", tmp_path / "own.npz")


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder like torchvision's, with MD5 sums to match."""
    datasets = pytest.importorskip("torchvision").datasets
    given = draw_arrays(shape=(7, 7))
    files = {"train-images-idx3-ubyte": given["x_train"], "train-labels-idx1-ubyte": given["y_train"].astype(np.uint8),
             "t10k-images-idx3-ubyte": given["x_test"], "t10k-labels-idx1-ubyte": given["y_test"].astype(np.uint8)}
    packed = {f"{name}.gz": gzip.compress(pack_idx(values)) for name, values in files.items()}
    write_folder(tmp_path / "root" / "MNIST" / "raw", packed)
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()])
    return tmp_path / "root"
