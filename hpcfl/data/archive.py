"""Archive: one data set as one HDF5 file, written with checksums and read by index with every check."""
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import hpcfl
from hpcfl.data.classes import called
from hpcfl.data.sources import Labelled
from hpcfl.errors import DataError
from hpcfl.wording import cause

PARTS = ("train", "test")
CHUNK_BYTES = 32 * 2**10                                           # unit of checksum: small, so that a scattered shard does not read the whole set
GAP_CHUNKS = 4                                                     # unwanted chunks cheaper to read along than to start another read
READ_BYTES = 8 * 2**20                                             # longest single read
FORMAT = ("v110", "v110")                                          # HDF5 1.10 checksums its own metadata too; older formats do not


@dataclass(frozen=True)
class Header:
    """What an archive says about itself; `shape` is (C, H, W), `train` and `test` are numbers of images, `counts` of each class by part."""

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
    notes: tuple[str, ...]                                         # what is otherwise than in the source


def digest(data: Labelled) -> str:
    """SHA-256 over the bytes of training images, training labels, test images, test labels (labels as little-endian int64)."""
    hasher = hashlib.sha256()
    for part in PARTS:
        hasher.update(np.ascontiguousarray(getattr(data, f"{part}_images")))
        hasher.update(getattr(data, f"{part}_labels").astype("<i8"))
    return hasher.hexdigest()


def write(path: Path, name: str, data: Labelled, source: str, licence: str) -> None:
    """Write a data set to a new file. Raises OSError or RuntimeError where the disk does not take it."""
    with h5py.File(path, "w", libver=FORMAT) as file:
        for part in PARTS:
            images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
            rows = max(1, min(len(images), CHUNK_BYTES // images[0].nbytes))
            file.create_dataset(f"{part}/images", data=images, chunks=(rows, *images.shape[1:]), fletcher32=True)
            file.create_dataset(f"{part}/labels", data=labels.astype("<i8"), chunks=labels.shape, fletcher32=True)
        names = np.array([name.encode(errors="backslashreplace") for name in called(data.names, data.classes)])
        counts = {part: np.bincount(getattr(data, f"{part}_labels"), minlength=data.classes) for part in PARTS}
        for key, values in {"names": names, **counts}.items():
            file.create_dataset(f"classes/{key}", data=values, chunks=values.shape, fletcher32=True)
        texts = {"name": name, "source": source, "licence": licence, "sha256": digest(data), "hpcfl_version": hpcfl.__version__,
                 "notes": "\n".join(data.notes) or "none"}
        # Of fixed length: texts of variable length lie in a heap without checksums, and HDF5 may never come back from reading a damaged one.
        file.attrs.update({key: np.bytes_(text.encode(errors="backslashreplace")) for key, text in texts.items()}, classes=data.classes)


def header(path: Path) -> Header:
    """Open an archive, check its layout, and tell what it holds; reads no images.

    Raises: DataError naming the file where it is missing, truncated, not laid out as `write` does it, or leads to other files.
    """
    with _reading(path) as file:
        try:
            texts = {key: _text(file.attrs[key]) for key in ("name", "source", "licence", "sha256")}
            classes = int(file.attrs["classes"])
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path}: is not a data set of hpcfl (attribute {error}); delete it and get or import it again") from error
        images = {part: _images(file, path, part) for part in PARTS}
        counts = {part: tuple(np.bincount(_labels(file, path, part, classes), minlength=classes).tolist()) for part in PARTS}
        shape = images["train"].shape[1:]
        if images["test"].shape[1:] != shape:
            raise DataError(f"{path}: test images are {images['test'].shape[1:]}, training images {shape} (C, H, W); wanted one size")
        return Header(classes=classes, shape=shape, train=len(images["train"]), test=len(images["test"]), names=_names(file, path, classes), counts=counts,
                      notes=_notes(file), **texts)


def verify(path: Path) -> None:
    """Read the whole archive and compare with its SHA-256.

    Raises: DataError naming the file where they differ or the file cannot be read.
    """
    hasher = hashlib.sha256()
    with _reading(path) as file:
        for part in PARTS:
            images = _images(file, path, part)
            step = _rows_per_read(images)
            for start in range(0, len(images), step):
                hasher.update(images[start:start + step])
            hasher.update(_dataset(file, path, f"{part}/labels")[:].astype("<i8"))
        wanted = _text(file.attrs.get("sha256", "missing"))
    if hasher.hexdigest() != wanted:
        raise DataError(f"{path}: the SHA-256 of its pixels and labels is {hasher.hexdigest()[:16]}..., it says {wanted[:16]}...; "
                        "the file was damaged or changed. Delete it and get or import it again")


def labels(path: Path, part: str) -> np.ndarray:
    """All labels of a part ("train" or "test"), (N,) int64. Raises DataError as `header` does, and for a label outside the classes."""
    with _reading(path) as file:
        return _labels(file, path, part, int(file.attrs["classes"]))


def images(path: Path, part: str, indices: np.ndarray | None = None) -> np.ndarray:
    """Images of a part, (n, C, H, W) uint8, in the order of the indices (repeats allowed); all of them by default.

    Every chunk is checked against its checksum (HDF5's Fletcher-32) as it is read.

    Raises: DataError naming the file where a checksum does not hold; IndexError for an index outside the part.
    """
    with _reading(path) as file:
        dataset = _images(file, path, part)
        return dataset[:] if indices is None else _gather(dataset, np.asarray(indices, dtype=np.int64))


def values(path: Path) -> tuple[int, int]:
    """The least and the greatest value of all pixels; reads the whole archive. Raises DataError as `images` does."""
    with _reading(path) as file:
        pieces = ((dataset, start, _rows_per_read(dataset)) for dataset in (_images(file, path, part) for part in PARTS)
                  for start in range(0, len(dataset), _rows_per_read(dataset)))
        lows, highs = zip(*((block.min(), block.max()) for block in (dataset[start:start + step] for dataset, start, step in pieces)), strict=True)
        return int(min(lows)), int(max(highs))


def _gather(dataset: h5py.Dataset, indices: np.ndarray) -> np.ndarray:
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
    longest = np.diff(wanted // _rows_per_read(dataset)) > 0
    edges = [0, *(np.flatnonzero(jumps | longest) + 1), len(wanted)]
    for start, stop in pairwise(edges):
        first, last = wanted[start], wanted[stop - 1]
        out[order[start:stop]] = dataset[first:last + 1][wanted[start:stop] - first]
    return out


def _rows_per_read(dataset: h5py.Dataset) -> int:
    """Rows of the longest read, a multiple of the chunk."""
    row_bytes = int(np.prod(dataset.shape[1:]))
    return dataset.chunks[0] * max(1, READ_BYTES // (row_bytes * dataset.chunks[0]))


@contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r", locking=False) as file:          # never written in place, and a read-only file system has no locks
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:      # what h5py makes of a damaged file
        raise DataError(f"{path}: cannot be read ({cause(error)}); it is missing, truncated or damaged. Delete it and get or import it again") from error


def _images(file: h5py.File, path: Path, part: str) -> h5py.Dataset:
    dataset = _dataset(file, path, f"{part}/images")
    if dataset.dtype != np.uint8 or dataset.ndim != 4 or 0 in dataset.shape or dataset.chunks is None:
        raise DataError(f"{path}: {part}/images is {dataset.dtype} of shape {dataset.shape}; wanted chunked uint8 (N, C, H, W)")
    return dataset


def _labels(file: h5py.File, path: Path, part: str, classes: int) -> np.ndarray:
    dataset, count = _dataset(file, path, f"{part}/labels"), len(_images(file, path, part))
    if dataset.dtype != np.int64 or dataset.shape != (count,):
        raise DataError(f"{path}: {part}/labels is {dataset.dtype} of shape {dataset.shape}; wanted int64 ({count},)")
    found = dataset[:]
    if found.min() < 0 or found.max() >= classes:
        raise DataError(f"{path}: {part}/labels reach from {found.min()} to {found.max()}; wanted 0..{classes - 1}")
    return found


def _names(file: h5py.File, path: Path, classes: int) -> tuple[str, ...]:
    if "classes" not in file:                                      # of an earlier hpcfl
        return called((), classes)
    dataset = _dataset(file, path, "classes/names")
    if dataset.dtype.kind != "S" or dataset.shape != (classes,):
        raise DataError(f"{path}: classes/names is {dataset.dtype} of shape {dataset.shape}; wanted text ({classes},)")
    return tuple(name.decode(errors="replace") for name in dataset[:])


def _notes(file: h5py.File) -> tuple[str, ...]:
    text = _text(file.attrs.get("notes", "none"))
    return () if text == "none" else tuple(text.split("\n"))


def _dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    """A dataset that lies in this very file: soft and external links, external storage and virtual datasets are refused, not followed."""
    place = file
    for step in name.split("/"):
        link = place.get(step, getlink=True) if isinstance(place, h5py.Group) else None
        if link is not None and not isinstance(link, h5py.HardLink):
            raise DataError(f"{path}: {name} is a {type(link).__name__} to somewhere else; links are not followed: import the data itself")
        if link is None:
            raise DataError(f"{path}: has no {name}; it is not a data set of hpcfl")
        place = place[step]
    if not isinstance(place, h5py.Dataset):
        raise DataError(f"{path}: {name} is not an array; it is not a data set of hpcfl")
    if place.external or place.is_virtual:
        raise DataError(f"{path}: the values of {name} lie in another file; such files are not followed: import the data itself")
    return place


def _text(attribute: Any) -> str:
    return attribute.decode() if isinstance(attribute, bytes) else str(attribute)
