"""Corpora: a data set by name, its labels in memory and its images read when asked for."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from hpcfl.data import archive, store
from hpcfl.data.classes import list_remarks
from hpcfl.data.embedded import EMBEDDED
from hpcfl.data.sources import PUBLISHED, Labelled
from hpcfl.errors import DataError
from hpcfl.wording import did_you_mean, nearest


@dataclass(frozen=True, eq=False)
class Corpus:
    """A data set: what everybody may know of it, and a way to its images, which stay uint8."""

    name: str
    classes: int
    shape: tuple[int, int, int]                                    # (C, H, W)
    train_labels: np.ndarray                                       # (N,) int64
    test_labels: np.ndarray                                        # (M,) int64
    sha256: str                                                    # of all pixels and labels: the identity of the data
    source: str                                                    # where they come from
    remarks: tuple[str, ...]                                       # what is to be known of them before a result is believed
    read: Callable[[str, np.ndarray | None], np.ndarray]           # (part, indices or None for all) -> images

    def train_images(self, indices: np.ndarray | None = None) -> np.ndarray:
        """Training images in the order of the indices, (n, C, H, W) uint8; all by default. Raises DataError where the file is damaged."""
        return self.read("train", indices)

    def test_images(self, indices: np.ndarray | None = None) -> np.ndarray:
        """Images of the official test set, (n, C, H, W) uint8; all by default. Raises DataError where the file is damaged."""
        return self.read("test", indices)


def open_corpus(name: str) -> Corpus:
    """The data set of that name: embedded ("digits", "random") or from the cache.

    Raises: DataError where it is not in the cache (with the command that brings it there) or its file is truncated, damaged or was changed.
    """
    if name in EMBEDDED:
        return _in_memory(name, EMBEDDED[name]())
    path = store.find_path(name)
    if not path.exists():
        raise DataError(_absent(name))
    header = store.check(path)
    train_labels, test_labels = (archive.read_labels(path, part) for part in archive.PARTS)
    return Corpus(name, header.classes, header.shape, train_labels, test_labels, header.sha256, header.source,
                  (*header.notes, *list_remarks(header.names, header.counts)), partial(archive.read_images, path))


def _absent(name: str) -> str:
    where = f"data set '{name}' is not in the cache {store.find_folder()}"
    if name in PUBLISHED:
        return f"{where}; get it with: hpcfl data get {name} [--from DIR]"
    return (f"{where} and is none of {', '.join((*EMBEDDED, *PUBLISHED))}{did_you_mean(nearest(name, (*EMBEDDED, *PUBLISHED), store.ALIKE))}; "
            f"a published one comes with: hpcfl data get NAME [--from DIR], your own with: hpcfl data import {name} --npz FILE")


def _in_memory(name: str, data: Labelled) -> Corpus:
    def read(part: str, indices: np.ndarray | None) -> np.ndarray:
        images = getattr(data, f"{part}_images")
        return images.copy() if indices is None else images[np.asarray(indices, dtype=np.int64)]
    return Corpus(name, data.classes, data.train_images.shape[1:], data.train_labels, data.test_labels, archive.compute_digest(data), "built in", (), read)
