"""Draft: what the disk refuses is kept in memory until somebody asks, so that HDF5 does not crash on it."""
import os
import resource
from pathlib import Path

import pytest

from hpcfl.errors import CheckpointError
from hpcfl.files import draft, trees
from tests.support.disks import TREES, limit_room
from tests.support.fork_server import SERVER


def test_what_the_disk_refused_is_read_back_from_memory(tmp_path, monkeypatch):
    with draft.Draft(tmp_path / "draft", lambda error: CheckpointError(str(error))) as file:
        file.write(b"0123456789")
        limit_room(monkeypatch, 2)
        file.seek(8)
        file.write(b"abcdef")
        file.seek(12)
        file.write(b"X")
        file.seek(0)
        assert file.read() == b"01234567abcdXf" and file.seek(0, os.SEEK_END) == 14
        with pytest.raises(CheckpointError, match="No space left"):
            file.check()


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


def test_a_draft_is_read_and_written_anywhere_as_a_file_is(tmp_path):
    with draft.Draft(tmp_path / "draft", lambda error: CheckpointError(str(error))) as file:
        assert file.readable() and file.writable() and file.seekable() and file.write(b"0123456789") == 10 and file.tell() == 10
        assert file.seek(-4, os.SEEK_END) == 6 and file.read(2) == b"67" and file.seek(1, os.SEEK_CUR) == 9
        file.seek(12)
        file.write(b"X")
        assert file.seek(0) == 0 and file.read() == b"0123456789\0\0X"
        assert file.truncate(4) == 4 and file.seek(0) == 0 and file.read() == b"0123"
        file.check()
    assert (tmp_path / "draft").read_bytes() == b"0123"


def test_a_draft_that_cannot_be_begun_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        draft.Draft(tmp_path / "none" / "draft", lambda error: CheckpointError(error.strerror))
