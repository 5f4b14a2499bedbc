"""Archive: one data set as one HDF5 file, written with checksums and read by index with every check."""
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import hpcfl
from hpcfl.data.classes import name_classes
from hpcfl.data.sources import Labelled
from hpcfl.errors import DataError
from hpcfl.files import hdf5
from hpcfl.files.draft import Draft

SPLITS = ("train", "test")
CHUNK_BYTES = 32 * 2**10                                           # unit of checksum: small, so that a scattered shard does not read the whole set
GAP_CHUNKS = 4                                                     # up to so many unwanted chunks are cheaper to read than another read is to start
READ_BYTES = 8 * 2**20                                             # longest single read
WAY_OUT = ". Delete it and get or import it again"


@dataclass(frozen=True)
class Header:
    """What an archive says about itself; `shape` is (C, H, W), `train` and `test` are numbers of images, `counts` of each class by split."""

    name: str
    classes: int
    shape: tuple[int, int, int]
    train: int
    test: int
    source: str
    licence: str
    sha256: str
    names: tuple[str, ...]                                         # of the classes
    counts: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]                                         # what differs from the source, a clause each


def compute_digest(data: Labelled) -> str:
    """SHA-256 over the bytes of training images, training labels, test images, test labels (labels as little-endian int64)."""
    hasher = hashlib.sha256()
    for split in SPLITS:
        hasher.update(np.ascontiguousarray(getattr(data, f"{split}_images")).data)
        hasher.update(getattr(data, f"{split}_labels").astype("<i8"))
    return hasher.hexdigest()


def write(draft: Draft, name: str, data: Labelled, source: str, licence: str) -> None:
    """Write a data set to a new file. Raises as `draft.check`."""
    with hdf5.filling(draft, hdf5.LIBVER) as file:
        for split in SPLITS:
            images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
            rows = max(1, min(len(images), CHUNK_BYTES // images[0].nbytes))
            file.create_dataset(f"{split}/images", data=images, chunks=(rows, *images.shape[1:]), fletcher32=True)
            draft.check()
            file.create_dataset(f"{split}/labels", data=labels.astype("<i8"), chunks=labels.shape, fletcher32=True)
        names = np.array([name.encode(errors="backslashreplace") for name in name_classes(data.names, data.classes)])
        counts = {split: np.bincount(getattr(data, f"{split}_labels"), minlength=data.classes) for split in SPLITS}
        for key, values in {"names": names, **counts}.items():
            file.create_dataset(f"classes/{key}", data=values, chunks=values.shape, fletcher32=True)
        texts = {"name": name, "source": source, "licence": licence, "sha256": compute_digest(data), "hpcfl_version": hpcfl.__version__,
                 "notes": "\n".join(data.notes) or "none"}
        # Of fixed length: texts of variable length lie in a heap without checksums, and HDF5 may never come back from reading a damaged one.
        file.attrs.update({key: np.bytes_(text.encode(errors="backslashreplace")) for key, text in texts.items()}, classes=data.classes)
    draft.check()


def read_header(path: Path) -> Header:
    """Open an archive, check its layout, and tell what it holds; reads no images.

    Raises: DataError naming the file where it is missing, truncated, not laid out as `write` does it, or leads to other files.
    """
    with hdf5.reading(path, DataError, WAY_OUT) as file:
        attributes = file.attributes
        if missing := [key for key in ("name", "source", "licence", "sha256", "classes") if key not in attributes]:
            raise DataError(f"{path}: is not a data set of hpcfl (it has no attribute '{missing[0]}'){WAY_OUT}")
        texts = {key: str(attributes[key]) for key in ("name", "source", "licence", "sha256")}
        classes = _read_classes(path, attributes)
        images = {split: _open_images(file, split) for split in SPLITS}
        counts = {split: tuple(np.bincount(_read_labels(file, split, classes), minlength=classes).tolist()) for split in SPLITS}
        shape = images["train"].shape[1:]
        if images["test"].shape[1:] != shape:
            raise DataError(f"{path}: test images are {images['test'].shape[1:]}, training images {shape} (C, H, W); wanted one size")
        return Header(classes=classes, shape=shape, train=len(images["train"]), test=len(images["test"]), names=_read_names(file, classes), counts=counts,
                      notes=_read_notes(attributes), **texts)


def verify(path: Path) -> None:
    """Read the whole archive and compare with its SHA-256.

    Raises: DataError naming the file where they differ or the file cannot be read.
    """
    hasher = hashlib.sha256()
    with hdf5.reading(path, DataError, WAY_OUT) as file:
        for split in SPLITS:
            images = _open_images(file, split)
            step = _count_rows_per_read(images)
            for start in range(0, len(images), step):
                hasher.update(file.values(images, slice(start, start + step)))
            hasher.update(file.values(file.dataset(f"{split}/labels")).astype("<i8"))
        wanted = str(file.attributes.get("sha256", "missing"))
    if hasher.hexdigest() != wanted:
        raise DataError(f"{path}: the SHA-256 of its pixels and labels is {hasher.hexdigest()[:16]}..., it says {wanted[:16]}...; "
                        f"the file was damaged or changed{WAY_OUT}")


def read_labels(path: Path, split: str) -> np.ndarray:
    """All labels of a split ("train" or "test"), (N,) int64. Raises DataError as `read_header` does, and for a label outside the classes."""
    with hdf5.reading(path, DataError, WAY_OUT) as file:
        return _read_labels(file, split, _read_classes(path, file.attributes))


def read_images(path: Path, split: str, indices: np.ndarray | None = None) -> np.ndarray:
    """Images of a split, (n, C, H, W) uint8, in the order of the indices (repeats allowed); all of them by default.

    Every chunk is checked against its checksum (HDF5's Fletcher-32) as it is read.

    Raises: DataError naming the file where a checksum does not hold; IndexError for an index outside the split.
    """
    with hdf5.reading(path, DataError, WAY_OUT) as file:
        dataset = _open_images(file, split)
        return file.values(dataset) if indices is None else _gather(file, dataset, np.asarray(indices, dtype=np.int64))


def read_value_range(path: Path) -> tuple[int, int]:
    """The least and the greatest value of all pixels; reads the whole archive. Raises DataError as `read_images` does."""
    with hdf5.reading(path, DataError, WAY_OUT) as file:
        pieces = ((dataset, start, _count_rows_per_read(dataset)) for dataset in (_open_images(file, split) for split in SPLITS)
                  for start in range(0, len(dataset), _count_rows_per_read(dataset)))
        lows, highs = zip(*((block.min(), block.max()) for block in (file.values(dataset, slice(start, start + step)) for dataset, start, step in pieces)),
                          strict=True)
        return int(min(lows)), int(max(highs))


def _gather(file: hdf5.Reader, dataset: h5py.Dataset, indices: np.ndarray) -> np.ndarray:
    """dataset[indices] by few long reads of whole chunks: HDF5's own point selection costs ten times as much."""
    out = np.empty((len(indices), *dataset.shape[1:]), dtype=np.uint8)
    if len(indices) == 0:
        return out
    order = np.argsort(indices, kind="stable")
    wanted = indices[order]                                        # ascending
    if wanted[0] < 0 or wanted[-1] >= len(dataset):
        raise IndexError(f"indices {wanted[0]}..{wanted[-1]} reach outside the {len(dataset)} images of {dataset.name}")
    chunk = wanted // dataset.chunks[0]
    jumps = np.diff(chunk) > GAP_CHUNKS
    longest = np.diff(wanted // _count_rows_per_read(dataset)) > 0
    edges = [0, *(np.flatnonzero(jumps | longest) + 1), len(wanted)]
    for start, stop in pairwise(edges):
        first, last = wanted[start], wanted[stop - 1]
        out[order[start:stop]] = file.values(dataset, slice(first, last + 1))[wanted[start:stop] - first]
    return out


def _count_rows_per_read(dataset: h5py.Dataset) -> int:
    """Rows of the longest read, a multiple of the chunk."""
    row_bytes = int(np.prod(dataset.shape[1:]))
    return dataset.chunks[0] * max(1, READ_BYTES // (row_bytes * dataset.chunks[0]))


def _read_classes(path: Path, attributes: Mapping[str, Any]) -> int:
    count = attributes.get("classes")
    if not isinstance(count, (int, np.integer)):
        raise DataError(f"{path}: attribute classes is {count!r}, wanted a whole number{WAY_OUT}")
    return int(count)


def _open_images(file: hdf5.Reader, split: str) -> h5py.Dataset:
    dataset = file.dataset(f"{split}/images")
    if dataset.dtype != np.uint8 or dataset.ndim != 4 or 0 in dataset.shape or dataset.chunks is None:
        raise DataError(f"{file.path}: {split}/images is {dataset.dtype} of shape {dataset.shape}; wanted chunked uint8 (N, C, H, W){WAY_OUT}")
    return dataset


def _read_labels(file: hdf5.Reader, split: str, classes: int) -> np.ndarray:
    dataset, count = file.dataset(f"{split}/labels"), len(_open_images(file, split))
    if dataset.dtype != np.int64 or dataset.shape != (count,):
        raise DataError(f"{file.path}: {split}/labels is {dataset.dtype} of shape {dataset.shape}; wanted int64 ({count},){WAY_OUT}")
    found = file.values(dataset)
    if found.min() < 0 or found.max() >= classes:
        raise DataError(f"{file.path}: {split}/labels reach from {found.min()} to {found.max()}; wanted 0..{classes - 1}{WAY_OUT}")
    return found


def _read_names(file: hdf5.Reader, classes: int) -> tuple[str, ...]:
    if "classes" not in file.members():                            # of an earlier hpcfl
        return name_classes((), classes)
    dataset = file.dataset("classes/names")
    if dataset.dtype.kind != "S" or dataset.shape != (classes,):
        raise DataError(f"{file.path}: classes/names is {dataset.dtype} of shape {dataset.shape}; wanted text ({classes},){WAY_OUT}")
    return tuple(file.values(dataset).tolist())


def _read_notes(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    text = str(attributes.get("notes", "none"))
    return () if text == "none" else tuple(text.split("\n"))
