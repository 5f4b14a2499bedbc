"""Trees: named Trees in one HDF5 file, written whole and read back."""
from collections.abc import Collection, Iterable
from pathlib import Path

import h5py
import numpy as np
import torch

from hpcfl.errors import CheckpointError, LayoutError
from hpcfl.files import hdf5
from hpcfl.files.atomic import WAY_OUT, hash_file, replacing
from hpcfl.tree import Tree

TYPE = "torch_dtype"                                               # attribute of a dataset that holds the bits of a type which numpy lacks
PLAIN = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.float32,
         torch.float64, torch.complex64, torch.complex128}         # types that numpy has too
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}                # by bytes of a number


def write_trees(path: Path, trees: Iterable[tuple[str, Tree]]) -> str:
    """Write named Trees to one HDF5 file, each as it comes, read it back to verify, and return its SHA-256. It takes the memory of one leaf.

    Raises: CheckpointError as `replacing` does; LayoutError for a leaf that is no plain array of numbers.
    """
    with replacing(path) as draft:
        shapes: dict[str, tuple[int, ...]] = {}
        with hdf5.filling(draft) as file:
            for name, tree in trees:
                group = file.create_group(name)
                for leaf_path, leaf in tree.items():
                    _put(group, leaf_path, leaf)
                    draft.check()
                    shapes[f"/{name}/{leaf_path}"] = tuple(leaf.shape)
        draft.check()
        with hdf5.reading(draft.path, CheckpointError) as written:
            if shapes != {leaf.name: leaf.shape for leaf in written.datasets()}:
                raise CheckpointError(f"{path}: does not read back as written; what was there before is untouched. {WAY_OUT}")
        with draft.telling():
            return hash_file(draft.path)


def read_trees(path: Path, names: Collection[str] | None = None) -> dict[str, Tree]:
    """The named Trees of a file, or all, on the host. Raises CheckpointError as hdf5.Reader does."""
    with hdf5.reading(path, CheckpointError) as file:
        wanted = file.members() if names is None else names
        return {name: {leaf.name[len(name) + 2:]: _get(file, leaf) for leaf in file.datasets(f"/{name}")} for name in wanted}


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


def _get(file: hdf5.Reader, dataset: h5py.Dataset) -> torch.Tensor:
    """What `_put` put there."""
    leaf = torch.from_numpy(np.asarray(file.values(dataset)))
    leaf = leaf if leaf.numel() else torch.empty_like(leaf, memory_format=torch.contiguous_format)         # numpy's empty arrays have strides of 0
    kind = file.attribute(dataset, TYPE)
    if kind is None:
        return leaf
    dtype = getattr(torch, str(kind), None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize != leaf.dtype.itemsize:
        raise CheckpointError(f"{file.path}: '{dataset.name}' holds the bits of type '{kind}', which torch {torch.__version__} does not know; "
                              "wanted one that does")
    return leaf.view(dtype)
