"""The run folder that all ranks try: it is left as it was, a lock is refused, a torn file is noticed, and nobody waits long for what does not appear."""
import threading
import time

import pytest

from hpcfl.doctor import run_folder
from hpcfl.errors import CheckpointError
from hpcfl.wire.communicator import Alone, Communicator, connect


def test_a_folder_is_looked_at_and_left_as_it_was(tmp_path):
    facts = run_folder.examine(Communicator(Alone()), tmp_path / "new" / "run")
    assert (facts.fault, facts.unwritable, facts.unseen, facts.torn, facts.locks) == ("", {}, {}, {}, {0: "refused"})
    assert facts.free_bytes > 0 and facts.write_s > 0 and facts.replaced > 0 and not list(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    run_folder.examine(Communicator(Alone()), tmp_path / "kept")
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


@pytest.mark.mpi(min_size=2)
def test_ranks_see_one_folder_and_the_lock_in_it(tmp_path):
    comm = connect()
    facts = run_folder.examine(comm, comm.share(tmp_path) / "run")
    if comm.is_server:
        assert (facts.fault, facts.unwritable, facts.unseen, facts.torn) == ("", {}, {}, {})
        assert facts.locks == dict.fromkeys(range(1, comm.size), "refused") and facts.reads > 0 and not list(tmp_path.iterdir())
    else:
        assert facts is None


def test_a_lock_is_refused_granted_or_not_to_be_had(tmp_path):
    file = tmp_path / "LOCK"
    with run_folder.hold(file):
        assert run_folder.ask_for_lock(file) == "refused"
    assert run_folder.ask_for_lock(file) == "granted"
    assert "No such file or directory" in run_folder.ask_for_lock(tmp_path / "none")


@pytest.mark.parametrize("atomic", [True, False])
def test_a_reader_notices_a_file_that_is_not_replaced_at_once(atomic, tmp_path, monkeypatch):
    """The writer replaces as the doctor does, or takes the old file away first and writes the new one piece by piece."""
    monkeypatch.setattr(run_folder, "RENAMING_S", 0.2)
    file, over = tmp_path / "LATEST", threading.Event()

    def write_in_place():
        with file.open("w") as handle:
            for _ in range(run_folder.REPEATED):
                handle.write("00000001")
                handle.flush()
                time.sleep(1e-5)                                   # lets go of the interpreter, so that the reader meets what is half written

    def keep_writing():
        while not over.is_set():
            run_folder.replace(file, 1) if atomic else write_in_place()
    run_folder.replace(file, 0)
    writer = threading.Thread(target=keep_writing)
    writer.start()
    count, fault = run_folder.keep_reading(file)
    over.set()
    writer.join()
    assert count > 0 and (fault == "" if atomic else "of 4096 characters" in fault), fault


def test_what_does_not_appear_is_not_waited_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SEEN_WITHIN_S", 0.05)
    with pytest.raises(CheckpointError, match="it is not there"):
        run_folder.wait_for((tmp_path / "none").is_file, "it is not there")
    run_folder.wait_for(tmp_path.is_dir, "it is not there")
