"""Storage: files that are either whole or not there, and Trees in HDF5."""
import errno
import hashlib
import json
import os
import platform
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from hpcfl.errors import CheckpointError, EnvironmentFault, LayoutError
from hpcfl.files import links
from hpcfl.files.draft import Draft
from hpcfl.files.places import place
from hpcfl.tree import Tree

WAY_OUT = ("Free space and give the same command again: the run goes on from its last checkpoint; or let it go on in another folder, with "
           "--resume FOLDER --out ANOTHER")
TYPE = "torch_dtype"                                               # attribute of a dataset that holds the bits of a type which numpy lacks
PLAIN = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.float32,
         torch.float64, torch.complex64, torch.complex128}         # types that numpy has too
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}                # by bytes of a number


@contextmanager
def replacing(path: Path, otherwise: Callable[[OSError], Exception] | None = None) -> Iterator[Draft]:
    """A file in the making that takes the place of `path`, whole and on the disk, when the block ends well; otherwise nothing is left of it.

    Raises: what `otherwise` makes of an error of the disk (full, read-only), by default a CheckpointError; what was at `path` stays as it was. What the block
    raises is not taken for one.
    """
    otherwise = otherwise or (lambda error: CheckpointError(f"{path}: could not be written: {error.strerror or error}; what was there before is untouched. "
                                                            f"{WAY_OUT}"))
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.part")
    try:
        make_folder(path.parent)
    except OSError as error:
        raise otherwise(error) from error
    try:
        with Draft(temporary, otherwise) as draft:
            yield draft
            draft.check()
            with draft.telling():
                sync(temporary)                                    # some disks refuse only here
                os.replace(temporary, path)
                sync(path.parent)
    finally:
        with suppress(OSError):                                    # a disk that takes nothing gives nothing away either; `sweep` comes later
            temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written anywhere below a folder; for its one owner, before anybody writes."""
    for left in folder.rglob(".*.part"):
        left.unlink(missing_ok=True)


def write_trees(path: Path, trees: Iterable[tuple[str, Tree]]) -> str:
    """Write named Trees to one HDF5 file, each as it comes, read it back to verify, and return its SHA-256. It takes the memory of one leaf.

    Raises: CheckpointError as `replacing` does; LayoutError for a leaf that is no plain array of numbers.
    """
    with replacing(path) as draft:
        shapes: dict[str, tuple[int, ...]] = {}
        with links.filling(draft) as file:
            for name, tree in trees:
                group = file.create_group(name)
                for leaf_path, leaf in tree.items():
                    _put(group, leaf_path, leaf)
                    draft.check()
                    shapes[f"/{name}/{leaf_path}"] = tuple(leaf.shape)
        draft.check()
        with links.reading(draft.path, CheckpointError) as written:
            if shapes != {leaf.name: leaf.shape for leaf in written.datasets()}:
                raise CheckpointError(f"{path}: does not read back as written; what was there before is untouched. {WAY_OUT}")
        with draft.telling():
            return sha256(draft.path)


def read_trees(path: Path, names: Collection[str] | None = None) -> dict[str, Tree]:
    """The named Trees of a file, or all, on the host. Raises CheckpointError as hdf5.Reader does."""
    with links.reading(path, CheckpointError) as file:
        wanted = file.members() if names is None else names
        return {name: {leaf.name[len(name) + 2:]: _leaf(file, leaf) for leaf in file.datasets(f"/{name}")} for name in wanted}


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file. Raises CheckpointError as `replacing` does."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file. Raises CheckpointError as `replacing` does."""
    with replacing(path) as draft:
        draft.write(text.encode())


def note(path: Path, text: str) -> None:
    """Replace a short text file; where the disk has no room for a new one, write into the old one, which has. Raises CheckpointError as `replacing` does."""
    try:
        write_text(path, text)
    except CheckpointError as refused:
        try:
            with path.open("r+b", buffering=0) as file:
                file.truncate(file.write(text.encode()))
        except OSError:
            raise refused from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, eq=False)
class Written:
    """A leaf in a Scratch, which keeps its place as long as this lives."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Scratch:
    """A file for leaves that need not outlive the process. It has no name, so that nothing is left of it however the process ends.

    Bare bytes: HDF5 took 4 ms to write 16 leaves (0.6 MB) and 2 ms to read them, this 0.1 ms for either. Nothing is flushed to the disk.
    """

    def __init__(self, folder: str):
        """`folder`: where the file lies; empty: the system's temporary folder.

        Raises: EnvironmentFault where no file can be made there.
        """
        self._end, self._free = 0, defaultdict[int, list[int]](list)                     # size in bytes -> where so much is free
        try:
            self._folder = place(folder) if folder else tempfile.gettempdir()
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
        except OSError as error:
            raise self._fault(error) from error

    def write(self, leaf: torch.Tensor) -> Written:
        """Put a leaf there. Raises EnvironmentFault where the disk does not take it (full)."""
        content = leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        free = self._free[len(content)]
        if free:                                                   # taken before the disk is waited for: meanwhile other places may become free
            start = free.pop()
        else:
            start, self._end = self._end, self._end + len(content)
        self._transfer(os.pwrite, content, start)
        written = Written(start, tuple(leaf.shape), leaf.dtype)
        weakref.finalize(written, free.append, start).atexit = False
        return written

    def read(self, written: Written) -> torch.Tensor:
        """The leaf, on the host, in memory of its own. Raises EnvironmentFault where the disk does not give it back."""
        leaf = torch.empty(written.shape, dtype=written.dtype)
        self._transfer(lambda handle, rest, place: os.preadv(handle, [rest], place), leaf.view(-1).view(torch.uint8).numpy(), written.start)
        return leaf

    def _transfer(self, move: Callable[[int, Any, int], int], content: Any, start: int) -> None:
        rest = memoryview(content)
        try:
            while len(rest):                                       # one call moves at most 2 GiB
                moved = move(self._file.fileno(), rest, start)
                if not moved:
                    raise OSError(errno.EIO, "the file ended early")
                start, rest = start + moved, rest[moved:]
        except OSError as error:
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(f"residency.folder: client states (residency.location = 'disk') cannot be kept in a file in {self._folder}, with {self._end} "
                                f"bytes there: {error.strerror}; free space, name another folder on a disk of this node, or set residency.location = 'host'")


def make_folder(folder: Path) -> None:
    """A folder, with those above it, that is still there after a power cut."""
    if not folder.exists():                                        # a file in the way is told by whoever writes below it
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(group: h5py.Group, path: str, leaf: torch.Tensor) -> None:
    """A leaf as a dataset; of a type that numpy lacks as its bits, integers of the same width, with the name of the type beside them."""
    if leaf.layout != torch.strided or leaf.is_quantized:
        raise LayoutError(f"'{group.name[1:]}/{path}' is {leaf.dtype}, {leaf.layout}; wanted plain arrays of numbers in what a client or the server keeps: "
                          "call .dequantize() or .to_dense() before it is put into a state")
    plain = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if leaf.dtype in PLAIN:
        group[path] = plain.numpy()
    else:
        group[path] = plain.view(BITS[leaf.dtype.itemsize]).numpy()
        group[path].attrs[TYPE] = str(leaf.dtype).removeprefix("torch.")


def _leaf(file: links.Reader, dataset: h5py.Dataset) -> torch.Tensor:
    """What `_put` put there."""
    leaf = torch.from_numpy(np.asarray(file.values(dataset)))
    leaf = leaf if leaf.numel() else torch.empty_like(leaf, memory_format=torch.contiguous_format)         # numpy's empty arrays have strides of 0
    kind = file.attribute(dataset, TYPE)
    if kind is None:
        return leaf
    dtype = getattr(torch, str(kind), None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize != leaf.dtype.itemsize:
        raise CheckpointError(f"{file.path}: '{dataset.name}' holds the bits of type '{kind}', which torch {torch.__version__} does not know; wanted one that does")
    return leaf.view(dtype)
