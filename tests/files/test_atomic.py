"""Atomic: a file is replaced whole or not at all, and what a killed process left is swept away."""
import errno
import hashlib
import os

import pytest

from hpcfl.errors import CheckpointError
from hpcfl.files import atomic, draft, trees
from tests.support.disks import TREES, limit_room


def test_other_faults_of_the_disk_are_told_by_their_names(tmp_path, monkeypatch):
    limit_room(monkeypatch, 3000, errno.EDQUOT)
    with pytest.raises(CheckpointError, match="could not be written: Disk quota exceeded"):
        trees.write_trees(tmp_path / "file.h5", TREES)
    monkeypatch.undo()
    monkeypatch.setattr(atomic.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(CheckpointError, match="could not be written: Input/output error"):
        trees.write_trees(tmp_path / "file.h5", TREES)
    assert not list(tmp_path.iterdir())


def test_a_short_note_finds_room_on_a_disk_that_has_none(tmp_path, monkeypatch):
    atomic.note(tmp_path / "STATUS", "running\n")
    monkeypatch.setattr(draft.os, "open", lambda *arguments: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    atomic.note(tmp_path / "STATUS", "failed: no room\n")
    atomic.note(tmp_path / "STATUS", "short\n")
    assert (tmp_path / "STATUS").read_text() == "short\n"
    with pytest.raises(CheckpointError, match="No space left"):
        atomic.note(tmp_path / "NEW", "text")


def test_text_is_written_as_utf_8(tmp_path):
    atomic.write_text(tmp_path / "STATUS", "größe\n")
    assert (tmp_path / "STATUS").read_bytes() == "größe\n".encode()


def test_a_block_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "below" / "file"
    atomic.write_text(path, "before\n")
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as draft:
        draft.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "before\n" and [each.name for each in path.parent.iterdir()] == ["file"]
    with atomic.replacing(path) as draft:
        draft.write(b"after\n")
        assert path.read_text() == "before\n", "nobody sees it before it is whole"
    assert path.read_text() == "after\n"


def test_a_fault_of_the_disk_is_the_error_that_the_caller_wants(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file/below: could not be written: (Not a directory|File exists); what was there before is untouched"):
        atomic.write_text(tmp_path / "file" / "below", "text")
    beside = tmp_path / "file" / "below"
    with pytest.raises(LookupError, match="Not a directory|File exists"), atomic.replacing(beside, lambda error: LookupError(error.strerror)):
        pass


def test_what_a_killed_process_left_is_swept_away_at_any_depth_and_nothing_else(tmp_path):
    for name in (".a.host-1.part", "below/deep/.b.h5.host-2.part", "below/kept.part", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    atomic.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".hidden", "kept.part"]


def test_json_is_written_in_one_order_and_a_sum_is_that_of_the_bytes(tmp_path):
    atomic.write_json(tmp_path / "one.json", {"b": [1, 2], "a": None})
    atomic.write_json(tmp_path / "other.json", {"a": None, "b": [1, 2]})
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    assert atomic.hash_file(tmp_path / "one.json") == hashlib.sha256((tmp_path / "one.json").read_bytes()).hexdigest()
