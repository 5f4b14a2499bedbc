"""Scratch: leaves that need not outlive the process come back with every bit, and their file has no name."""
import errno
import os

import pytest
import torch

from hpcfl.errors import EnvironmentFault
from hpcfl.files import scratch
from hpcfl.files.scratch import Scratch
from tests.support.disks import have_same_bits

LEAVES = [torch.arange(12.0).reshape(3, 4), torch.arange(12.0).reshape(3, 4).T, torch.tensor(7), torch.empty(0, 5), torch.tensor([True, False]),
          torch.tensor([1.5, float("nan")], dtype=torch.bfloat16)]


def test_leaves_come_back_in_any_order_in_memory_of_their_own(tmp_path):
    file = Scratch(str(tmp_path))
    written = [file.write(leaf) for leaf in LEAVES]
    for place, leaf in reversed(list(zip(written, LEAVES, strict=True))):
        one, other = file.read(place), file.read(place)
        assert have_same_bits(one, leaf.contiguous()) and (not leaf.numel() or one.data_ptr() != other.data_ptr())


def test_nothing_of_it_is_seen_in_its_folder(tmp_path):
    file = Scratch(str(tmp_path))
    file.write(torch.zeros(1000))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_and_a_disk_without_room_are_told_with_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(EnvironmentFault, match="residency.folder: client states .* cannot be kept in a file in .*none, with 0 bytes there: No such file"):
        Scratch(str(tmp_path / "none"))
    file = Scratch(str(tmp_path))
    monkeypatch.setattr(scratch.os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(EnvironmentFault,
                       match="No space left on device; free space, name another folder on a disk of this node, or set residency.location = 'host'"):
        file.write(torch.zeros(10))


def test_a_file_that_ends_early_is_told(tmp_path):
    file = Scratch(str(tmp_path))
    written = file.write(torch.zeros(10))
    os.ftruncate(file._file.fileno(), 8)
    with pytest.raises(EnvironmentFault, match="the file ended early|Input/output error"):
        file.read(written)
