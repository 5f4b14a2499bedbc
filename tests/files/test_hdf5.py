"""Files that are whole or not there: whatever the disk refuses at whatever moment is an error, what others raise is their own, and leaves keep every bit."""
import errno
import os
import resource
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpcfl import tree
from hpcfl.errors import CheckpointError, LayoutError
from hpcfl.files import atomic, draft, scratch, trees
from hpcfl.wire import packing
from tests.support.fork_server import SERVER
from tests.support.tiny_runs import left_half_written

NAMES = ("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64", "complex32",
         "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
DTYPES = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]
TREES = [("server", {"w": torch.arange(4000.0), "b/c": torch.arange(7)}), ("000001", {f"x{number}": torch.full((30,), number) for number in range(40)})]


def refusing(monkeypatch, room: int, code: int = errno.ENOSPC) -> list[int]:
    """A disk with room for so many bytes in all writes together; what is left of it."""
    left = [room]

    def pwrite(handle, content, place):
        taken = min(len(content), left[0])
        if not taken:
            raise OSError(code, os.strerror(code))
        left[0] -= taken
        return write(handle, content[:taken], place)
    write = os.pwrite
    monkeypatch.setattr(draft.os, "pwrite", pwrite)
    return left


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same type, shape and bits."""
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    return not one.numel() or one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))


def test_wherever_the_disk_becomes_full_what_was_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "file.h5"
    trees.write_trees(path, TREES[:1])
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        left = refusing(patch, 1 << 30)
        trees.write_trees(tmp_path / "whole.h5", TREES)
        size = (1 << 30) - left[0]
    for room in range(0, size, size // 60):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="file.h5: could not be written: No space left on device"):
            refusing(patch, room)
            trees.write_trees(path, TREES)
        assert path.read_bytes() == before and not left_half_written(tmp_path)


def test_a_full_disk_ends_the_work_at_the_next_leaf(tmp_path, monkeypatch):
    refusing(monkeypatch, 5000)
    asked = []

    def failing():
        for number in range(50):
            asked.append(number)
            yield f"{number:06d}", {"w": torch.zeros(2000)}
    with pytest.raises(CheckpointError):
        trees.write_trees(tmp_path / "file.h5", failing())
    assert len(asked) < 5


def test_what_the_disk_refused_is_read_back_from_memory(tmp_path, monkeypatch):
    with draft.Draft(tmp_path / "draft", lambda error: CheckpointError(str(error))) as file:
        file.write(b"0123456789")
        refusing(monkeypatch, 2)
        file.seek(8)
        file.write(b"abcdef")
        file.seek(12)
        file.write(b"X")
        file.seek(0)
        assert file.read() == b"01234567abcdXf" and file.seek(0, os.SEEK_END) == 14
        with pytest.raises(CheckpointError, match="No space left"):
            file.check()


def test_other_faults_of_the_disk_are_told_by_their_names(tmp_path, monkeypatch):
    refusing(monkeypatch, 3000, errno.EDQUOT)
    with pytest.raises(CheckpointError, match="could not be written: Disk quota exceeded"):
        trees.write_trees(tmp_path / "file.h5", TREES)
    monkeypatch.undo()
    monkeypatch.setattr(atomic.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(CheckpointError, match="could not be written: Input/output error"):
        trees.write_trees(tmp_path / "file.h5", TREES)
    assert not list(tmp_path.iterdir())


def limited(folder: Path, limits: range, answers) -> None:
    """In a process of its own: files of no more than so many bytes."""
    told = []
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            trees.write_trees(folder / "file.h5", TREES)
        except CheckpointError as error:
            told.append(str(error))
    answers.put(told)


def test_a_limit_on_the_size_of_files_is_an_error_too(tmp_path):
    answers, limits = SERVER.SimpleQueue(), range(0, 20_000, 997)
    process = SERVER.Process(target=limited, args=(tmp_path, limits, answers))
    process.start()
    process.join(60)
    assert process.exitcode == 0, "HDF5 crashes where it cannot write"
    told = answers.get()
    assert len(told) == len(limits) and all("could not be written: File too large" in text for text in told)
    assert not list(tmp_path.iterdir())


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
    assert read.keys() == leaves.keys() and all(same(read[path], leaves[path].contiguous()) for path in leaves)
    file = scratch.Scratch(str(tmp_path))
    assert all(same(file.read(file.write(leaf)), leaf.contiguous()) for leaf in [*leaves.values(), *read.values()])
    travelled, = packing.unpack(packing.pack([leaves]), [tree.layout(leaves)])
    assert all(same(travelled[path], leaves[path].contiguous()) for path in leaves)


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


@pytest.mark.parametrize("way", ["external link", "soft link", "external link to a group", "kept in another file", "virtual dataset", "endless group"])
def test_nothing_leads_a_checkpoint_into_another_file(tmp_path, way):
    trees.write_trees(tmp_path / "other.h5", TREES)
    trees.write_trees(tmp_path / "file.h5", TREES[:1])
    with h5py.File(tmp_path / "file.h5", "r+") as file:
        server = file["server"]
        if way == "external link":
            server["more"] = h5py.ExternalLink("other.h5", "/server/w")
        elif way == "soft link":
            server["more"] = h5py.SoftLink("/server/w")
        elif way == "external link to a group":
            file["000001"] = h5py.ExternalLink("other.h5", "/000001")
        elif way == "kept in another file":
            server.create_dataset("more", (16,), np.uint8, external=[(str(tmp_path / "other.h5"), 0, 16)])
        elif way == "endless group":
            server["more"] = server
        else:
            layout = h5py.VirtualLayout((4000,), np.float32)
            layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "server/w", (4000,))
            server.create_virtual_dataset("more", layout)
    words = "deeper than" if way == "endless group" else f"{way.removesuffix(' to a group')}.*not followed"
    with pytest.raises(CheckpointError, match=words):
        trees.read_trees(tmp_path / "file.h5")


def test_a_short_note_finds_room_on_a_disk_that_has_none(tmp_path, monkeypatch):
    atomic.note(tmp_path / "STATUS", "running\n")
    monkeypatch.setattr(draft.os, "open", lambda *arguments: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    atomic.note(tmp_path / "STATUS", "failed: no room\n")
    atomic.note(tmp_path / "STATUS", "short\n")
    assert (tmp_path / "STATUS").read_text() == "short\n"
    with pytest.raises(CheckpointError, match="No space left"):
        atomic.note(tmp_path / "NEW", "text")
