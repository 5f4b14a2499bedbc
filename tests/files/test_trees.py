"""Trees: every leaf comes back with every bit, from a file that is whole or not there, whatever the disk refuses at whatever moment."""
import h5py
import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.errors import CheckpointError, LayoutError
from hpcfl.files import scratch, trees
from hpcfl.wire import packing
from tests.support.disks import TREES, have_same_bits, limit_room
from tests.support.tiny_runs import left_half_written

NAMES = ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64", "complex32",
         "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
DTYPES = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]


def test_wherever_the_disk_becomes_full_what_was_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "file.h5"
    trees.write_trees(path, TREES[:1])
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        left = limit_room(patch, 1 << 30)
        trees.write_trees(tmp_path / "whole.h5", TREES)
        size = (1 << 30) - left[0]
    for room in range(0, size, size // 60):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="file.h5: could not be written: No space left on device"):
            limit_room(patch, room)
            trees.write_trees(path, TREES)
        assert path.read_bytes() == before and not left_half_written(tmp_path)


def test_a_full_disk_ends_the_work_at_the_next_leaf(tmp_path, monkeypatch):
    limit_room(monkeypatch, 5000)
    asked = []

    def failing():
        for number in range(50):
            asked.append(number)
            yield f"{number:06d}", {"w": torch.zeros(2000)}
    with pytest.raises(CheckpointError):
        trees.write_trees(tmp_path / "file.h5", failing())
    assert len(asked) < 5


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), torch.OutOfMemoryError("CUDA out of memory"), KeyError("generator"), OSError("of another")],
                         ids=lambda error: type(error).__name__)
def test_what_the_states_raise_is_not_taken_for_the_disk(tmp_path, error):
    trees.write_trees(tmp_path / "file.h5", TREES[:1])
    before = (tmp_path / "file.h5").read_bytes()

    def failing():
        yield TREES[0]
        raise error
    with pytest.raises(type(error)) as raised:
        trees.write_trees(tmp_path / "file.h5", failing())
    assert raised.value is error and (tmp_path / "file.h5").read_bytes() == before and not left_half_written(tmp_path)


def test_what_a_reader_of_trees_raises_is_not_damage(tmp_path, monkeypatch):
    trees.write_trees(tmp_path / "file.h5", TREES)
    monkeypatch.setattr(trees, "_get", lambda file, dataset: {}["own mistake"])
    with pytest.raises(KeyError, match="own mistake"):
        trees.read_trees(tmp_path / "file.h5")


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_leaf_of_any_type_of_torch_keeps_every_bit(tmp_path, dtype):
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 12 * dtype.itemsize, dtype=np.uint8))
    bits = bits % 2 if dtype == torch.bool else bits
    numbers = bits.view(dtype)
    leaves = {"some": numbers.reshape(3, 4), "one": numbers[0].clone(), "none": numbers[:0], "turned": numbers.reshape(3, 4).T}
    trees.write_trees(tmp_path / "file.h5", [("server", leaves)])
    read = trees.read_trees(tmp_path / "file.h5")["server"]
    assert read.keys() == leaves.keys() and all(have_same_bits(read[path], leaves[path].contiguous()) for path in leaves)
    file = scratch.Scratch(str(tmp_path))
    assert all(have_same_bits(file.read(file.write(leaf)), leaf.contiguous()) for leaf in [*leaves.values(), *read.values()])
    travelled, = packing.unpack(packing.pack([leaves]), [tree.layout(leaves)])
    assert all(have_same_bits(travelled[path], leaves[path].contiguous()) for path in leaves)


def test_a_conjugate_is_stored_as_what_it_is(tmp_path):
    leaf = torch.tensor([1 + 2j, 3 - 4j]).conj()
    trees.write_trees(tmp_path / "file.h5", [("server", {"z": leaf, "minus": leaf.imag})])
    read = trees.read_trees(tmp_path / "file.h5")["server"]
    assert read["z"].tolist() == [1 - 2j, 3 + 4j] and read["minus"].tolist() == [-2.0, 4.0]


def test_a_leaf_that_is_no_plain_array_is_refused_with_its_path(tmp_path):
    with pytest.raises(LayoutError, match=r"'server/mask' is torch.float32, torch.sparse_coo; wanted plain arrays .*to_dense"):
        trees.write_trees(tmp_path / "file.h5", [("server", {"mask": torch.eye(3).to_sparse()})])
    assert not list(tmp_path.iterdir())


def test_bits_of_a_type_that_this_torch_lacks_are_refused_by_name(tmp_path):
    trees.write_trees(tmp_path / "file.h5", [("server", {"w": torch.zeros(3, dtype=torch.bfloat16)})])
    with h5py.File(tmp_path / "file.h5", "r+") as file:
        file["server/w"].attrs[trees.TYPE] = "float1_of_tomorrow"
    with pytest.raises(CheckpointError, match="'/server/w' holds the bits of type 'float1_of_tomorrow', which torch .* does not know"):
        trees.read_trees(tmp_path / "file.h5")
