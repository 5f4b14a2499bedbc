"""HDF5: the one reader of all HDF5 files, which never leaves the file it was given, and the one way to fill a new one."""
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np

from hpcfl.errors import HpcflError
from hpcfl.files.draft import Draft
from hpcfl.wording import cause_text

LIBVER = ("v110", "v110")                                          # HDF5 1.10 checksums its own metadata; older formats do not
Member: TypeAlias = h5py.Group | h5py.Dataset | h5py.Datatype
DEPTH = 64                                                         # groups deeper than this are a file that links to itself


class Reader:
    """An HDF5 file open for reading; whatever in it leads elsewhere is refused: links, data kept in or put together from other files.

    Raises: `fault`, an error type of hpcfl.errors, naming the file, where h5py cannot read it; what its user does wrong is his own.
    """

    def __init__(self, file: h5py.File, path: Path, fault: type[HpcflError], advice: str):
        self.file, self.path, self._fault, self._advice = file, path, fault, advice

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of the file itself, texts as str."""
        with _calls(self.path, self._fault, self._advice):
            return {name: _plain(value) for name, value in self.file.attrs.items()}

    def members(self, group: str | h5py.Group = "/") -> list[str]:
        """The names in a group."""
        found = self._find(group) if isinstance(group, str) else group
        if not isinstance(found, h5py.Group):
            raise self._fault(f"{self.path}: '{group}' is no group{self._advice}")
        with _calls(self.path, self._fault, self._advice):
            return list(found)

    def datasets(self, group: str = "/") -> Iterator[h5py.Dataset]:
        """Every dataset below a group."""
        yield from self._below(self._find(group), group.strip("/"))

    def dataset(self, path: str) -> h5py.Dataset:
        """One dataset."""
        found = self._find(path)
        if not isinstance(found, h5py.Dataset):
            raise self._fault(f"{self.path}: '{path}' is not an array{self._advice}")
        return found

    def values(self, dataset: h5py.Dataset, selection: Any = ()) -> Any:
        """dataset[selection], by default all of it; texts are an array of str."""
        with _calls(self.path, self._fault, self._advice):
            if h5py.check_string_dtype(dataset.dtype) is not None:
                return np.asarray(dataset.asstr("utf-8", "replace")[selection], object)
            return dataset[selection]

    def attribute(self, dataset: h5py.Dataset, name: str) -> Any:
        """One attribute of a dataset, text as str; None where there is none."""
        with _calls(self.path, self._fault, self._advice):
            return _plain(dataset.attrs.get(name))

    def _below(self, group: h5py.Group, path: str) -> Iterator[h5py.Dataset]:
        for name in self.members(group):
            inner = f"{path}/{name}".lstrip("/")
            found = self._step(group, name, inner)
            if isinstance(found, h5py.Dataset):
                yield found
            elif isinstance(found, h5py.Group):
                if inner.count("/") > DEPTH:
                    raise self._fault(f"{self.path}: '{inner}' lies deeper than {DEPTH} groups{self._advice}")
                yield from self._below(found, inner)

    def _find(self, path: str) -> Member:
        place: Member = self.file
        for step in filter(None, path.split("/")):
            place = self._step(place, step, path.strip("/"))
        return place

    def _step(self, place: Member, name: str, path: str) -> Member:
        with _calls(self.path, self._fault, self._advice):
            there = isinstance(place, h5py.Group) and name in place
            elsewhere = explain_foreign(place, name) if there else None
            found = place[name] if there and not elsewhere else None
        if not there:
            raise self._fault(f"{self.path}: has no '{path}'{self._advice}")
        if elsewhere:
            raise self._fault(f"{self.path}: '{path}' leads elsewhere ({elsewhere}) and is not followed; only data inside the file itself is read")
        return found


@contextmanager
def reading(path: Path, fault: type[HpcflError], advice: str = "") -> Iterator[Reader]:
    """A file open for reading. `advice`: how an error message goes on, for example ". Delete it and import it again".

    Raises: as Reader, also for a file that is missing, truncated or no HDF5 file.
    """
    with _calls(path, fault, advice):
        file = h5py.File(path, "r", locking=False)                 # not every file system has locks, and nothing is written in place
    try:
        yield Reader(file, path, fault, advice)
    finally:
        file.close()


@contextmanager
def filling(draft: Draft, libver: tuple[str, str] | None = None) -> Iterator[h5py.File]:
    """A new HDF5 file whose bytes go to a draft, which takes every write: HDF5 crashes where it cannot flush what it closes."""
    with h5py.File(draft, "w", libver=libver) as file:
        yield file


def explain_foreign(parent: h5py.Group, name: str) -> str | None:
    """Why a member of a group is not the file's own, as words for a message; None where it is."""
    link = parent.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        return f"external link to {link.filename}:{link.path}"
    if isinstance(link, h5py.SoftLink):
        return f"soft link to {link.path}"
    if parent.get(name, getclass=True) is h5py.Dataset:
        dataset = parent[name]
        if dataset.external:
            return f"dataset kept in another file ({dataset.external[0][0]})"
        if dataset.is_virtual:
            return "virtual dataset, put together from other files"
    return None


def reason_text(error: BaseException) -> str:
    """Why a call failed, in one line: HDF5 buries the system's reason in an account of its own."""
    told = re.search(r"error message = '([^']+)'", str(error))
    return told[1] if told else getattr(error, "strerror", None) or cause_text(error)


@contextmanager
def _calls(path: Path, fault: type[HpcflError], advice: str) -> Iterator[None]:
    """Around calls of h5py alone, each of which may raise any of these for a damaged file."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise fault(f"{path}: cannot be read as HDF5 ({reason_text(error)}); it is missing, truncated or damaged{advice}") from error


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
